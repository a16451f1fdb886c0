// Package supervise is PID 1 of an enclave: it prepares the kernel's file systems and the loopback
// device, serves the control channel, and holds the workload's life from its image to its exit status.
package supervise
