package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"
)

// registry passes requests on to another registry and treats blobs as its flags say. Its ready line
// ends with its port.
func registry(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("registry", flag.ContinueOnError)
	upstream := flags.String("upstream", "", "`URL` of the real registry")
	delay := flags.Duration("delay", 0, "wait before a blob is served")
	pause := flags.Duration("pause", 0, "wait before a manifest is served")
	user := flags.String("user", "", "`NAME:PASSWORD` that requests must carry")
	missing := flags.Duration("missing", 0, "find nothing for this long")
	flip := flags.String("flip", "", "`digest` of a blob or manifest that is served with one bit changed")
	swap := flags.String("swap", "", "`digest=other`: serve the other blob under the first digest")
	if err := flags.Parse(args); err != nil {
		return err
	}
	target, err := url.Parse(*upstream)
	if err != nil {
		return err
	}
	from, to, _ := strings.Cut(*swap, "=")
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			if from != "" {
				r.Out.URL.Path = strings.Replace(r.Out.URL.Path, from, to, 1)
			}
		},
		ModifyResponse: func(r *http.Response) error {
			if *flip == "" || !strings.HasSuffix(r.Request.URL.Path, *flip) || r.Request.Method != http.MethodGet {
				return nil
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return err
			}
			if len(body) > 0 {
				body[len(body)/2] ^= 1
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			return nil
		},
	}
	start := time.Now()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name, password, _ := r.BasicAuth(); *user != "" && name+":"+password != *user {
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		if r.URL.Path != "/v2/" && time.Since(start) < *missing {
			http.NotFound(w, r)
			return
		}
		wait := time.Duration(0)
		switch {
		case strings.Contains(r.URL.Path, "/blobs/"):
			wait = *delay
		case strings.Contains(r.URL.Path, "/manifests/"):
			wait = *pause
		}
		if wait > 0 {
			select {
			case <-time.After(wait):
			case <-r.Context().Done():
				return
			}
		}
		proxy.ServeHTTP(w, r)
	})
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	fmt.Println("ready", l.Addr().(*net.TCPAddr).Port)
	err = http.Serve(l, handler)
	if ctx.Err() != nil {
		return nil
	}
	return err
}
