package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

// client is one client of load and, in JSON, its result.
type client struct {
	Requests    int      `json:"requests"`
	Connections int64    `json:"connections"`
	Failures    []string `json:"failures"` // one sentence a failed request
	Protocol    string   `json:"protocol"` // of the last answer

	name, path, want string
	protocol         string // offered by ALPN
	http             *http.Client
	dialed           atomic.Int64
}

// load asks testapp at ADDR with several clients at once. It prints at the end what became of every
// request. All verify the enclave on every connection, and post, so that net/http does not quietly
// repeat a request that may have arrived.
func load(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	addr := flags.String("addr", "", "`HOST:PORT` of the Service")
	measurements := flags.String("measurements", "", "`file` with the measurement set")
	root := flags.String("root", "", "`file` with the root certificate")
	every := flags.Duration("every", 50*time.Millisecond, "time from one request of a client to its next")
	if err := flags.Parse(args); err != nil {
		return err
	}
	opts, err := options(*measurements, *root)
	if err != nil {
		return err
	}
	if err := reach(ctx, *addr); err != nil {
		return err
	}
	clients := []*client{
		{name: "fresh", protocol: "http/1.1", path: "/echo", want: body}, // a connection for each request
		{name: "kept", protocol: "h2", path: "/echo", want: body},
		{name: "kept HTTP/1.1", protocol: "http/1.1", path: "/echo", want: body},
		{name: "slow", protocol: "h2", path: "/slow?for=2s", want: "done"},
	}
	var ready, done sync.WaitGroup
	for _, c := range clients {
		verifier, err := attestation.NewVerifier(opts)
		if err != nil {
			return err
		}
		transport := &http.Transport{
			TLSClientConfig:   verifier.ClientConfig(&tls.Config{NextProtos: []string{c.protocol}}),
			DisableKeepAlives: c.name == "fresh",
			ForceAttemptHTTP2: c.protocol == "h2",
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				c.dialed.Add(1)
				var d net.Dialer
				return d.DialContext(ctx, network, address)
			},
		}
		c.http = &http.Client{Transport: transport, Timeout: 10 * time.Second}
		ready.Add(1)
		done.Go(func() { c.run(ctx, "https://"+*addr+c.path, *every, ready.Done) })
	}
	ready.Wait()
	fmt.Println("ready")
	done.Wait()
	result := map[string]*client{}
	for _, c := range clients {
		c.Connections = c.dialed.Load()
		result[c.name] = c
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

// reach waits until addr accepts connections: a Service is there some time before the node knows.
func reach(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func options(measurements, root string) (attestation.Options, error) {
	var opts attestation.Options
	set, err := os.ReadFile(measurements)
	if err != nil {
		return opts, err
	}
	if opts.Measurements, err = workload.ParseMeasurements(set); err != nil {
		return opts, err
	}
	pem, err := os.ReadFile(root)
	if err != nil {
		return opts, err
	}
	opts.Root, err = attestation.ParseRoot(pem)
	return opts, err
}

// run asks url until ctx is done, and calls ready after the second request.
func (c *client) run(ctx context.Context, url string, every time.Duration, ready func()) {
	const warm = 2
	tick := time.NewTicker(every)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := c.ask(url); err != nil {
			c.Failures = append(c.Failures, time.Now().UTC().Format(time.RFC3339Nano)+" "+err.Error())
		}
		if c.Requests++; c.Requests == warm {
			ready()
		}
		<-tick.C
	}
	if c.Requests < warm {
		ready()
	}
}

// body is what every request carries.
const body = "here"

func (c *client) ask(url string) error {
	r, err := c.http.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		return err
	}
	defer r.Body.Close()
	answer, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	c.Protocol = r.Proto
	if r.StatusCode != http.StatusOK || string(answer) != c.want {
		return errors.New(r.Status + ": " + string(answer))
	}
	return nil
}
