package nsm_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	hfnsm "github.com/hf/nsm"
	"github.com/hf/nsm/response"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsm/nsmtest"
)

func TestRegisters(t *testing.T) {
	m := nsmtest.New(t).Open(t)
	ctx := t.Context()

	value, locked, err := m.DescribePCR(ctx, 16)
	if err != nil || locked || !bytes.Equal(value, make([]byte, 48)) {
		t.Fatalf("before: value %x, locked %t, error %v", value, locked, err)
	}
	extended, err := m.ExtendPCR(ctx, 16, []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	want := sha512.Sum384(append(make([]byte, 48), "data"...))
	if diff := cmp.Diff(want[:], extended); diff != "" {
		t.Error(diff)
	}
	if err := m.LockPCR(ctx, 16); err != nil {
		t.Fatal(err)
	}
	value, locked, err = m.DescribePCR(ctx, 16)
	if err != nil || !locked || !bytes.Equal(value, want[:]) {
		t.Fatalf("after: value %x, locked %t, error %v", value, locked, err)
	}

	var refused *nsm.Error
	if _, err := m.ExtendPCR(ctx, 16, []byte("more")); !errors.As(err, &refused) || refused.Code != response.ECReadOnlyIndex || refused.Op != "ExtendPCR" {
		t.Errorf("extending a locked register: %v", err)
	}
	if err := m.LockPCR(ctx, 99); !errors.As(err, &refused) || refused.Code != "InvalidIndex" {
		t.Errorf("locking a register that is not there: %v", err)
	}
}

func TestAttest(t *testing.T) {
	module := nsmtest.New(t)
	m := module.Open(t)
	long := make([]byte, nsm.MaxData+1)
	for name, c := range map[string]struct {
		userData, nonce, publicKey []byte
		refused                    bool
	}{
		"absent":          {},
		"empty":           {userData: []byte{}, nonce: []byte{}, publicKey: []byte{}},
		"largest":         {userData: long[1:], nonce: long[1:], publicKey: make([]byte, nsm.MaxPublicKey)},
		"long user data":  {userData: long, refused: true},
		"long nonce":      {nonce: long, refused: true},
		"long public key": {publicKey: make([]byte, nsm.MaxPublicKey+1), refused: true},
	} {
		t.Run(name, func(t *testing.T) {
			document, err := m.Attest(t.Context(), c.userData, c.nonce, c.publicKey)
			var refused *nsm.Error
			if c.refused {
				if !errors.As(err, &refused) || refused.Code != response.ECInputTooLarge {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			d, err := attestation.Verify(document, attestation.Options{Root: module.Root()})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([][]byte{c.userData, c.nonce, c.publicKey}, [][]byte{d.UserData, d.Nonce, d.PublicKey}); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDescribeAndRandom(t *testing.T) {
	m := nsmtest.New(t).Open(t)
	d, err := m.DescribeNSM(t.Context())
	if err != nil || d.Digest != response.DigestSHA384 || d.MaxPCRs != 32 {
		t.Errorf("got %+v, %v", d, err)
	}
	random, err := m.Random(t.Context())
	if err != nil || len(random) != 256 {
		t.Errorf("got %d bytes, %v", len(random), err)
	}
}

// Requests are served in the order in which they came, and one whose caller has gone is left out.
func TestQueue(t *testing.T) {
	module := nsmtest.New(t)
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		var mu sync.Mutex
		module.Before = func(string) response.ErrorCode {
			<-gate
			return ""
		}
		m := nsm.New(nsm.NewDevelopment(module.Dial))
		var order []int
		var done sync.WaitGroup
		contexts, cancels := make([]context.Context, 8), make([]context.CancelFunc, 8)
		for i := range 8 {
			contexts[i], cancels[i] = context.WithCancel(t.Context())
			done.Go(func() {
				_, err := m.Random(contexts[i])
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					order = append(order, i)
				} else if !errors.Is(err, context.Canceled) {
					t.Errorf("request %d: %v", i, err)
				}
			})
			synctest.Wait() // the request is in the queue
		}
		cancels[3]()
		synctest.Wait()
		for range 7 {
			gate <- struct{}{}
			synctest.Wait()
		}
		done.Wait()
		for _, cancel := range cancels {
			cancel()
		}
		if diff := cmp.Diff([]int{0, 1, 2, 4, 5, 6, 7}, order); diff != "" {
			t.Error(diff)
		}
		m.Close()
	})
}

// A request that is given up leaves no answer behind for the next one.
func TestInterrupted(t *testing.T) {
	module := nsmtest.New(t)
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		dials := 0
		module.Before = func(op string) response.ErrorCode {
			if op == "GetRandom" {
				<-gate
			}
			return ""
		}
		m := nsm.New(nsm.NewDevelopment(func(ctx context.Context) (net.Conn, error) {
			dials++
			return module.Dial(ctx)
		}))
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			synctest.Wait()
			cancel()
		}()
		if _, err := m.Random(ctx); err == nil {
			t.Error("the interrupted request succeeded")
		}
		close(gate)
		if _, err := m.DescribeNSM(t.Context()); err != nil {
			t.Errorf("the next request: %v", err)
		}
		if dials != 2 {
			t.Errorf("dialled %d times, want 2", dials)
		}
		m.Close()
		if _, err := m.Random(t.Context()); err == nil {
			t.Error("a request after Close succeeded")
		}
	})
}

func TestWrongAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"another request":  "\xa1\x6bDescribePCR\xa2\x64lock\xf4\x64data\x40",
		"text":             "\x67LockPCR",
		"unknown text":     "\x63abc",
		"not CBOR":         "\xff",
		"no answer":        "",
		"error":            "\xa1\x65Error\x6dInternalError",
		"empty document":   "\xa1\x6bAttestation\xa1\x68document\x40",
		"longer than 12 k": string(make([]byte, 0x3001)),
	} {
		t.Run(name, func(t *testing.T) {
			m := nsm.New(nsm.NewDevelopment(func(context.Context) (net.Conn, error) {
				client, server := net.Pipe()
				go func() {
					defer server.Close()
					nsm.ReadMessage(server, 0x1000)
					nsm.WriteMessage(server, []byte(answer))
				}()
				return client, nil
			}))
			defer m.Close()
			if document, err := m.Attest(t.Context(), nil, nil, nil); err == nil {
				t.Errorf("got %x", document)
			}
		})
	}
}

// device is /dev/nsm as far as a test can have one: its ioctl fails.
type device struct{}

func (device) Fd() uintptr  { return 0 }
func (device) Close() error { return nil }

func TestDeviceErrors(t *testing.T) {
	for errno, code := range map[syscall.Errno]response.ErrorCode{
		syscall.EMSGSIZE: response.ECInputTooLarge,
		syscall.EIO:      "",
	} {
		t.Run(errno.Error(), func(t *testing.T) {
			p, err := nsm.OpenSession(hfnsm.Options{
				Open:    func() (hfnsm.FileDescriptor, error) { return device{}, nil },
				Syscall: func(_, _, _, _ uintptr) (uintptr, uintptr, syscall.Errno) { return 0, 0, errno },
			})
			if err != nil {
				t.Fatal(err)
			}
			m := nsm.New(p)
			_, err = m.Random(t.Context())
			var refused *nsm.Error
			if errors.As(err, &refused) != (code != "") || (refused != nil && refused.Code != code) {
				t.Errorf("got %v", err)
			}
			if err == nil {
				t.Error("no error")
			}
			m.Close()
			if _, err := m.Random(t.Context()); err == nil {
				t.Error("a request after Close succeeded")
			}
		})
	}
}

func TestReadMessage(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want string
		err  error
	}{
		"message":   {in: "\x00\x00\x00\x02ab", want: "ab"},
		"end":       {in: "", err: io.EOF},
		"cut head":  {in: "\x00\x00", err: io.ErrUnexpectedEOF},
		"cut":       {in: "\x00\x00\x00\x02a", err: io.ErrUnexpectedEOF},
		"only head": {in: "\x00\x00\x00\x02", err: io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := nsm.ReadMessage(bytes.NewBufferString(c.in), 4)
			if string(got) != c.want || !errors.Is(err, c.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	for _, n := range []uint32{0, 5, 1 << 31} {
		head := []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
		if got, err := nsm.ReadMessage(bytes.NewReader(append(head, "abcdefgh"...)), 4); err == nil {
			t.Errorf("length %d: got %q", n, got)
		}
	}
}

// The host answers for the development module, so the answers are foreign data.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{"\xa1\x69GetRandom\xa1\x66random\x41a", "\x67LockPCR", "\xa1\x65Error\x61a", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		m := nsm.New(nsm.NewDevelopment(func(context.Context) (net.Conn, error) {
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				nsm.ReadMessage(server, 0x1000)
				nsm.WriteMessage(server, answer)
			}()
			return client, nil
		}))
		defer m.Close()
		random, err := m.Random(t.Context())
		if err == nil && len(random) == 0 {
			t.Error("no bytes and no error")
		}
		_ = fmt.Sprint(err)
	})
}
