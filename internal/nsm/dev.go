package nsm

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"
)

// development is a software module at the other end of a stream.
type development struct {
	dial   func(context.Context) (net.Conn, error)
	conn   net.Conn // nil before the first request and after a failed one
	closed bool
}

// NewDevelopment returns the development module behind dial: on the stream each request is its length
// in 4 bytes, big-endian, and the CBOR that /dev/nsm takes; each answer has the same form. The stream
// is dialled with the first request, and again after an error.
func NewDevelopment(dial func(context.Context) (net.Conn, error)) Provider {
	return &development{dial: dial}
}

func (d *development) Send(ctx context.Context, req request.Request) (response.Response, error) {
	var res response.Response
	if d.closed {
		return res, errClosed
	}
	encoded, err := cbor.Marshal(req.Encoded())
	if err != nil {
		return res, fmt.Errorf("encode request: %w", err)
	}
	if len(encoded) > maxRequest {
		return response.Response{Error: response.ECInputTooLarge}, nil
	}
	if d.conn == nil {
		if d.conn, err = d.dial(ctx); err != nil {
			d.conn = nil
			return res, fmt.Errorf("connect: %w", err)
		}
	}
	answer, err := exchange(ctx, d.conn, encoded)
	if err == nil {
		if err = cbor.Unmarshal(answer, &res); err == nil {
			return res, nil
		}
		err = fmt.Errorf("decode answer: %w", err)
	}
	// Where the stream stands is unknown: a late answer must not become that of the next request.
	d.conn.Close()
	d.conn = nil
	return response.Response{}, err
}

func (d *development) Close() error {
	d.closed = true
	if d.conn == nil {
		return nil
	}
	return d.conn.Close()
}

// exchange writes one request and reads the answer; the end of ctx interrupts both.
func exchange(ctx context.Context, c net.Conn, req []byte) (answer []byte, err error) {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx) // the deadline would hit the next request
		}
	}()
	if err := WriteMessage(c, req); err != nil {
		return nil, err
	}
	return ReadMessage(c, maxResponse)
}

// WriteMessage writes one request or answer of the development module.
func WriteMessage(w io.Writer, message []byte) error {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(message)), uint32(len(message)))
	_, err := w.Write(append(b, message...))
	return err
}

// ReadMessage reads one request or answer of the development module, of 1 to limit bytes. It returns
// io.EOF where the stream ends before the message begins.
func ReadMessage(r io.Reader, limit int) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || uint64(n) > uint64(limit) {
		return nil, fmt.Errorf("a message of %d bytes where 1 to %d are allowed", n, limit)
	}
	message := make([]byte, n)
	if _, err := io.ReadFull(r, message); err != nil {
		return nil, fmt.Errorf("read message: %w", noEOF(err))
	}
	return message, nil
}

// noEOF tells a stream that was cut from one that has ended.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
