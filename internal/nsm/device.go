package nsm

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/hf/nsm"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"
)

// device is /dev/nsm.
type device struct {
	session *nsm.Session
	closed  bool
}

// OpenDevice opens /dev/nsm. A request that the device has begun cannot be interrupted.
func OpenDevice() (Provider, error) {
	return openSession(nsm.DefaultOptions)
}

func openSession(options nsm.Options) (Provider, error) {
	session, err := nsm.OpenSession(options)
	if err != nil {
		return nil, fmt.Errorf("open the security module: %w", err)
	}
	return &device{session: session}, nil
}

func (d *device) Send(_ context.Context, req request.Request) (response.Response, error) {
	if d.closed {
		return response.Response{}, errClosed
	}
	res, err := d.session.Send(req)
	return tooLarge(res, err)
}

// tooLarge makes the driver's EMSGSIZE what AWS's own library makes of it (nsm-api src/driver/mod.rs).
func tooLarge(res response.Response, err error) (response.Response, error) {
	var ioctl *nsm.ErrorIoctlFailed
	if errors.As(err, &ioctl) && ioctl.Errno == syscall.EMSGSIZE {
		return response.Response{Error: response.ECInputTooLarge}, nil
	}
	return res, err
}

func (d *device) Close() error {
	d.closed = true
	return d.session.Close()
}
