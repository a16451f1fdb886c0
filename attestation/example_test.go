package attestation_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

// A client of net/http that talks only to enclaves of its measurement set.
func ExampleVerifier_ClientConfig() {
	enclave := startEnclave()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s from the enclave", r.Proto)
	}))
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{Certificates: []tls.Certificate{enclave.certificate(attestation.UserDataServer)}}
	server.StartTLS()
	defer server.Close()

	verifier, err := attestation.NewVerifier(attestation.Options{
		Measurements: measurements,
		Root:         enclave.root(), // left out for a real enclave
	})
	if err != nil {
		log.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig:   verifier.ClientConfig(nil),
		ForceAttemptHTTP2: true,
	}}
	response, err := client.Get(server.URL)
	if err != nil {
		log.Fatal(err) // an *attestation.Error if the enclave was refused
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(body))

	document, err := verifier.Document(*response.TLS)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(document.ModuleID, "development:", document.Development)
	// Output:
	// HTTP/2.0 from the enclave
	// i-0123456789abcdef0-enc0123456789abcdef development: true
}

// A gRPC client that talks only to enclaves of its measurement set.
func ExampleVerifier_ClientConfig_grpc() {
	enclave := startEnclave()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	certificate := enclave.certificate(attestation.UserDataServer)
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	go server.Serve(listener)
	defer server.Stop()

	verifier, err := attestation.NewVerifier(attestation.Options{
		Measurements: measurements,
		Root:         enclave.root(), // left out for a real enclave
	})
	if err != nil {
		log.Fatal(err)
	}
	conn, err := grpc.NewClient(listener.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewTLS(verifier.ClientConfig(nil))))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Status)
	// Output: SERVING
}

// A server that serves only enclaves of its measurement set, and the client inside such an enclave.
func ExampleClientVerifier_ServerConfig() {
	enclave := startEnclave()
	verifier, err := attestation.NewClientVerifier(attestation.Options{
		Measurements: measurements,
		Root:         enclave.root(), // left out for real enclaves
	})
	if err != nil {
		log.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		document, err := verifier.Document(*r.TLS)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden) // too old by now
			return
		}
		fmt.Fprintf(w, "hello, %s", document.ModuleID)
	}))
	server.TLS = verifier.ServerConfig(&tls.Config{}) // httptest adds the server's own certificate
	server.StartTLS()
	defer server.Close()

	client := server.Client()
	client.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{enclave.certificate(attestation.UserDataClient)}
	response, err := client.Get(server.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(body))
	// Output: hello, i-0123456789abcdef0-enc0123456789abcdef
}

// A fresh document, as an enclave's /.well-known/cloister/attestation?nonce=… answers with.
func ExampleVerify() {
	enclave := startEnclave()
	nonce := make([]byte, 32)
	rand.Read(nonce)
	doc := enclave.document(nil, nonce, nil)

	document, err := attestation.Verify(doc, attestation.Options{
		Nonce:        nonce,
		Measurements: measurements,
		Root:         enclave.root(), // left out for a real enclave
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("PCR0 %x…\n", document.PCRs[0][:8])

	// What was refused, and by which rule.
	_, err = attestation.Verify(doc, attestation.Options{Nonce: nonce})
	var refused *attestation.Error
	fmt.Println(errors.As(err, &refused), refused.Rule)
	measurements := workload.MeasurementSet{{PCR0: measurements[0].PCR16, PCR16: measurements[0].PCR16}}
	_, err = attestation.Verify(doc, attestation.Options{Nonce: nonce, Measurements: measurements, Root: enclave.root()})
	var mismatch *workload.MismatchError
	fmt.Println(errors.As(err, &mismatch), mismatch.Mismatches[0].PCR)
	// Output:
	// PCR0 0a0a0a0a0a0a0a0a…
	// true chain
	// true 0
}

// An archived document is verified at the time at which it was made: that shows who made it, not that it
// is fresh.
func ExampleVerify_archived() {
	enclave := startEnclave()
	doc := enclave.document(nil, nil, nil)

	claimed, err := attestation.ParseUnverified(doc)
	if err != nil {
		log.Fatal(err)
	}
	document, err := attestation.Verify(doc, attestation.Options{
		Now:  claimed.Timestamp,
		Root: enclave.root(), // left out for a real enclave
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(document.ModuleID, time.Since(document.Timestamp) < time.Hour)
	// Output: i-0123456789abcdef0-enc0123456789abcdef true
}
