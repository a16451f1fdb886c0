// Package workload describes what runs inside an enclave: the workload manifest, its canonical form,
// the register PCR16 that it is measured into, and sets of measurements that clients trust.
package workload
