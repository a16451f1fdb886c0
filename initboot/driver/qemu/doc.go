// Package qemu boots an EIF in QEMU's nitro-enclave machine (docs/system/i386/nitro-enclave.rst there): a real
// kernel, real vsock and an emulated security module at /dev/nsm, without hardware. The host reads all of the
// enclave's memory, and the emulated module signs nothing, so it is for tests.
package qemu
