// Testapp is the workload of the end-to-end tests: an HTTP server that can be told to misbehave.
//
//	testapp serve [-listen :8080,…] [-after 0s] [-tls] [-health :9000]
//	                                                     serves until SIGTERM; -health: the gRPC health service
//	testapp exit CODE [FILE TEXT]                        ends at once, after it has written the file
//	testapp note FILE TEXT                               hook: appends the text, its uid and NAME to the file
//	testapp exists FILE                                  exec probe: fails if the file does not exist
//	testapp wait FILE                                    init container: ends when the file exists
//	testapp vsock                                        prints what making an AF_VSOCK socket gives; it goes nowhere
//	testapp write FILE TEXT                              init container: makes a file and its folder
//
// The server, whose certificate for -tls is in TLS_CERT and TLS_KEY, answers
//
//	/echo            the request's body, or its query
//	/slow?for=2s     "done", after that time
//	/count           how often /echo was asked
//	/env?name=N      the value of an environment variable
//	/headers         the request's headers as JSON, each name with its values
//	/telemetry       sends a span, a count and a log record with OpenTelemetry's SDK, as its environment says
//	/get?url=U       what an ordinary client gets from there, or "error: " and why; it trusts CA_CERT
//	/check/N         200, or 503 after /break/N, until /mend/N
//	/read?file=F     the content of a file, or "error: " and why
//	/touch?file=F    makes a file
//	/remove?file=F   removes it
//	/note?file=F&text=T  does what "testapp note" does
//	/listen?on=A     listens on an address, until /unlisten?on=A
//	/exit?code=N     answers, then ends with code N
//
// When it ends it prints the file JOURNAL and writes the file LAST_WORD, if the environment names them.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "testapp:", err)
		code = 1
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("want serve, exit, exists or wait")
	}
	switch args[0] {
	case "exists":
		_, err := os.Stat(args[1])
		return 0, err
	case "wait":
		for {
			if _, err := os.Stat(args[1]); err == nil {
				return 0, nil
			}
			time.Sleep(100 * time.Millisecond)
		}
	case "write":
		if err := os.MkdirAll(filepath.Dir(args[1]), 0o755); err != nil {
			return 0, err
		}
		return 0, os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "vsock":
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		fmt.Println("testapp: socket:", err)
		return 0, nil
	case "note":
		return 0, note(args[1], args[2])
	case "exit":
		fmt.Println("testapp: started")
		if len(args) == 4 {
			if err := os.WriteFile(args[2], []byte(args[3]), 0o666); err != nil {
				return 0, err
			}
		}
		return strconv.Atoi(args[1])
	case "serve":
		fmt.Println("testapp: started")
		return serve(args[1:])
	}
	return 0, fmt.Errorf("unknown command %q", args[0])
}

// serve answers requests until SIGTERM (exit code 0) or /exit.
func serve(args []string) (int, error) {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	listen := flags.String("listen", ":8080", "addresses, separated by commas")
	after := flags.Duration("after", 0, "wait before listening")
	healthAddr := flags.String("health", "", "address of the gRPC health service")
	withTLS := flags.Bool("tls", false, "speak TLS, with the PEM in the environment")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	select {
	case <-time.After(*after):
	case <-ctx.Done():
		return 0, nil
	}
	exit := make(chan int, 1)
	var broken sync.Map // names of checks
	if *healthAddr != "" {
		if err := serveHealth(*healthAddr, &broken); err != nil {
			return 0, err
		}
	}
	server := &http.Server{Handler: handler(exit, &broken)}
	failed := make(chan error, 1)
	for addr := range strings.SplitSeq(*listen, ",") {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return 0, err
		}
		if *withTLS {
			cert, err := tls.X509KeyPair([]byte(os.Getenv("TLS_CERT")), []byte(os.Getenv("TLS_KEY")))
			if err != nil {
				return 0, err
			}
			l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})
		}
		go func() { failed <- server.Serve(l) }()
	}
	fmt.Println("testapp: listening")

	code := 0
	select {
	case err := <-failed:
		return 0, err
	case code = <-exit:
	case <-ctx.Done():
	}
	fmt.Println("testapp: stopping")
	lastWords()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return code, server.Shutdown(ctx)
}

// handler serves what the package's comment lists; exit gets the code of /exit, broken the broken checks.
func handler(exit chan<- int, broken *sync.Map) http.Handler {
	var echoed atomic.Int64
	mux := http.NewServeMux()
	consoleHandlers(mux)
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		echoed.Add(1)
		if n, _ := io.Copy(w, r.Body); n == 0 {
			io.WriteString(w, r.URL.RawQuery)
		}
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(r.FormValue("for"))
		if err != nil {
			report(w, err)
			return
		}
		select {
		case <-time.After(d):
			io.WriteString(w, "done")
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, echoed.Load()) })
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, os.Getenv(r.FormValue("name"))) })
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(r.Header) })
	mux.HandleFunc("/telemetry", func(w http.ResponseWriter, r *http.Request) { report(w, sendTelemetry(r)) })
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		body, err := get(r.Context(), r.FormValue("url"))
		if err != nil {
			fmt.Fprint(w, "error: ", err)
			return
		}
		w.Write(body)
	})
	mux.HandleFunc("/check/{name}", func(w http.ResponseWriter, r *http.Request) {
		if _, ok := broken.Load(r.PathValue("name")); ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/break/{name}", func(w http.ResponseWriter, r *http.Request) { broken.Store(r.PathValue("name"), nil) })
	mux.HandleFunc("/mend/{name}", func(w http.ResponseWriter, r *http.Request) { broken.Delete(r.PathValue("name")) })
	mux.HandleFunc("/read", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.FormValue("file"))
		if err != nil {
			fmt.Fprint(w, "error: ", err)
			return
		}
		w.Write(b)
	})
	mux.HandleFunc("/touch", func(w http.ResponseWriter, r *http.Request) { report(w, os.WriteFile(r.FormValue("file"), nil, 0o600)) })
	mux.HandleFunc("/remove", func(w http.ResponseWriter, r *http.Request) { report(w, os.Remove(r.FormValue("file"))) })
	mux.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.FormValue("code"))
		report(w, err)
		if err == nil {
			exit <- code
		}
	})
	return mux
}

// get is an ordinary client.
func get(ctx context.Context, url string) ([]byte, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(os.Getenv("CA_CERT")))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	return io.ReadAll(res.Body)
}

func report(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}
