// Package nitroemu gives an unmodified process a working /dev/nitro_enclaves, where there is no such device.
//
// A seccomp filter hands the process's openat, ioctl and mbind to a Node (seccomp_unotify(2)), which answers
// what concerns the device and lets all else continue. It keeps the rules of the kernel's driver
// (drivers/virt/nitro_enclaves/ne_misc_dev.c) and reads arguments and memory out of the process. The
// descriptors that it injects are read ends of pipes: an enclave's end is EPOLLHUP, as with the driver,
// without any poll being answered; the last close of a descriptor ends the enclave.
//
// The kernel's header is transcribed here, and not shared with what is tested.
package nitroemu
