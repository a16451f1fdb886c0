// Package nitro runs an EIF in an AWS Nitro enclave, by the ioctls of /dev/nitro_enclaves
// (include/uapi/linux/nitro_enclaves.h, Documentation/virt/ne_overview.rst of the Linux kernel).
//
// The process that holds the enclave's descriptor is its life: when that is closed, by whatever way the
// process ends, the hypervisor ends the enclave and the node gets its memory and vCPUs back.
package nitro
