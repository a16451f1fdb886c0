// Package boot holds the one enclave of a pod: it boots it in named steps that can each be undone,
// watches over it, and serves the pod socket, through which the console runs the workload and the
// sidecar follows the enclave's state.
package boot
