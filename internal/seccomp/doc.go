// Package seccomp keeps processes off AF_VSOCK.
//
// Vsock is not namespaced: whoever can open such a socket reaches every vsock port of the machine, or
// from inside an enclave every port of its host. The process driver of initboot puts the filter on its
// whole enclave, enclaved on the workload.
package seccomp
