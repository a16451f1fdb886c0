// Package console stands in a pod for the container that runs in the enclave: it asks initboot to run
// the workload, prints what it prints, answers its probes, passes the stop on, and ends with its exit
// code.
package console
