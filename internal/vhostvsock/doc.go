// Package vhostvsock is the device at the other end of a virtual machine's vsock: a vhost-user backend
// (docs/interop/vhost-user.rst in QEMU) of the virtio socket device (virtio 1.2, 5.10). The virtual machine
// monitor hands over the guest's memory, and this process moves the bytes of every stream between the rings
// in it and a unix socket.
//
// A stream ends in both directions apart, as vsock's and unix sockets' both do. Nothing that was sent before
// an end is lost, however slow its reader is. The guest is not trusted: what it writes into memory is
// checked before it is used.
package vhostvsock
