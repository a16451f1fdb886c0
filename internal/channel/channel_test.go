package channel

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type enclave struct {
	UnimplementedEnclaveServer
	seen chan string
}

func (e *enclave) Configure(_ context.Context, r *ConfigureRequest) (*ConfigureResponse, error) {
	e.seen <- string(r.Manifest)
	return &ConfigureResponse{Document: []byte("document")}, nil
}

func TestControlChannel(t *testing.T) {
	host, guest := net.Pipe()
	e := &enclave{seen: make(chan string, 1)}
	served := make(chan error, 1)
	go func() {
		served <- ServeEnclave(guest, func(r grpc.ServiceRegistrar) { RegisterEnclaveServer(r, e) })
	}()
	conn, done, err := NewClient(host)
	if err != nil {
		t.Fatal(err)
	}
	client := NewEnclaveClient(conn)
	r, err := client.Configure(t.Context(), &ConfigureRequest{Manifest: []byte("{}")})
	if err != nil || string(r.GetDocument()) != "document" || <-e.seen != "{}" {
		t.Fatalf("Configure: %v, %v", r, err)
	}
	select {
	case <-done:
		t.Fatal("done before the end")
	default:
	}

	guest.Close() // the enclave dies
	<-done
	if err := <-served; err != nil {
		t.Errorf("ServeEnclave: %v", err)
	}
	if _, err := client.Configure(t.Context(), &ConfigureRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a call after the end: %v, want Unavailable", err)
	}
}

func TestHeartbeatRefusesOtherBytes(t *testing.T) {
	host, guest := net.Pipe()
	go func() {
		guest.Write([]byte{0x42})
		guest.Read(make([]byte, 1))
	}()
	if _, _, err := NewClient(host); err == nil {
		t.Error("another byte than 0xB7 was taken for a heartbeat")
	}
}
