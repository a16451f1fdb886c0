package attestation_test

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

// A client of net/http that talks only to enclaves of its measurement set.
func ExampleVerifier_ClientConfig() {
	data, err := os.ReadFile("measurements.json")
	if err != nil {
		log.Fatal(err)
	}
	set, err := workload.ParseMeasurements(data)
	if err != nil {
		log.Fatal(err)
	}
	verifier, err := attestation.NewVerifier(attestation.Options{Measurements: set})
	if err != nil {
		log.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig:   verifier.ClientConfig(nil),
		ForceAttemptHTTP2: true,
	}}
	resp, err := client.Get("https://payments.example")
	if err != nil {
		log.Fatal(err) // an *attestation.Error if the enclave was refused
	}
	defer resp.Body.Close()
	document, err := verifier.Document(*resp.TLS)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(document.ModuleID, document.Timestamp)
}

// An archived document is verified at the time at which it was made.
func ExampleVerify() {
	doc, err := os.ReadFile("attestation.bin")
	if err != nil {
		log.Fatal(err)
	}
	claimed, err := attestation.ParseUnverified(doc)
	if err != nil {
		log.Fatal(err)
	}
	document, err := attestation.Verify(doc, attestation.Options{Now: claimed.Timestamp})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("PCR0 %x at %s\n", document.PCRs[0], document.Timestamp.Format(time.RFC3339))
}
