// Workload is an unsuspecting HTTP server, the image of initboot's integration test.
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello from uid", os.Getuid(), os.Getenv("GREETING"))
	})
	fmt.Println("listening")
	fmt.Fprintln(os.Stderr, "to stderr")
	go http.Serve(l, nil)
	<-ctx.Done()
	fmt.Println("bye")
	os.Exit(7)
}
