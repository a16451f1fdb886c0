// Package attestation decides whether an AWS Nitro attestation document proves which code made it.
//
// Verify checks one document: its CBOR and COSE form, the signature, the certificate chain to one
// pinned root, validity and age, and whatever the caller pins in Options: nonce, user data, public
// key and measurements.
//
// Verifier does the same inside a TLS 1.3 handshake (RA-TLS): the server's self-signed certificate
// carries a document that names the certificate's own key, so that the connection that carries the
// data ends in the attested enclave. Its ClientConfig fits net/http, gRPC and crypto/tls.
// ClientVerifier is its counterpart for a server whose clients are enclaves.
//
// Every refusal is an *Error that names the rule that failed; a measurement that differs is also a
// *workload.MismatchError with the registers, expected and seen.
//
// Sources: AWS, "Verifying the root of trust" and nsm-api docs/attestation_process.md; RFC 9052
// (COSE_Sign1), RFC 5280 (certificates), RFC 9999 (conceptual message wrapper).
package attestation
