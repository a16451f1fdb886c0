// Package seccomp is the seccomp profile of the containers that speak AF_VSOCK to a Nitro enclave, which
// RuntimeDefault refuses because vsock has no namespaces. `initboot install seccomp` writes it to a node.
//
// It is containerd's default profile (contrib/seccomp/seccomp_default.go, v2.3.7) for a container without
// capabilities on amd64 and arm64, socket(AF_VSOCK), and mbind, by which initboot takes memory of the enclave
// pool's NUMA node: in the form of the OCI runtime specification, as container runtimes read a profile of the
// node.
package seccomp

import _ "embed"

// Profile is cloister-vsock.json.
//
//go:embed cloister-vsock.json
var Profile []byte

// Name is the profile's file name in the folder profiles of the kubelet's seccomp folder.
const Name = "cloister-vsock.json"
