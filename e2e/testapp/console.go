package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// note appends a line to a file: a text, and who writes it.
func note(file, text string) error {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintf(f, "%s uid=%d NAME=%s\n", text, os.Getuid(), os.Getenv("NAME"))
	return err
}

// lastWords prints what has been noted in the file JOURNAL, and leaves a message in the file LAST_WORD.
func lastWords() {
	if file := os.Getenv("JOURNAL"); file != "" {
		b, _ := os.ReadFile(file)
		fmt.Printf("testapp: journal\n%s", b)
	}
	if file := os.Getenv("LAST_WORD"); file != "" {
		if err := os.WriteFile(file, []byte("so long"), 0o666); err != nil {
			fmt.Println("testapp:", err)
		}
	}
}

// health is the health service; a service whose check is broken does not serve.
type health struct {
	healthpb.UnimplementedHealthServer
	broken *sync.Map
}

func (h health) Check(_ context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if r.GetService() == "" {
		return nil, status.Error(codes.NotFound, "name a service")
	}
	s := healthpb.HealthCheckResponse_SERVING
	if _, ok := h.broken.Load(r.GetService()); ok {
		s = healthpb.HealthCheckResponse_NOT_SERVING
	}
	return &healthpb.HealthCheckResponse{Status: s}, nil
}

// serveHealth serves the health service for the life of the process.
func serveHealth(addr string, broken *sync.Map) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health{broken: broken})
	go s.Serve(l)
	return nil
}

// consoleHandlers serve files and listeners.
func consoleHandlers(mux *http.ServeMux) {
	mux.HandleFunc("/note", func(w http.ResponseWriter, r *http.Request) {
		report(w, note(r.FormValue("file"), r.FormValue("text")))
	})
	var listeners sync.Map // by address
	mux.HandleFunc("/listen", func(w http.ResponseWriter, r *http.Request) {
		l, err := net.Listen("tcp", r.FormValue("on"))
		if err == nil {
			listeners.Store(r.FormValue("on"), l)
		}
		report(w, err)
	})
	mux.HandleFunc("/unlisten", func(w http.ResponseWriter, r *http.Request) {
		l, ok := listeners.LoadAndDelete(r.FormValue("on"))
		if !ok {
			report(w, fmt.Errorf("nobody listens on %s", r.FormValue("on")))
			return
		}
		report(w, l.(net.Listener).Close())
	})
}
