// Package process runs an EIF's ramdisks as plain processes, for development and tests: /init is PID 1
// in new pid, mount, net, ipc and uts namespaces, on a tmpfs, with hybrid vsock sockets at /run/vsock.
// No hardware is needed. It is not an isolation boundary: the host reads all of the enclave's memory.
//
// The enclave is prepared by this same binary, which is executed again under another name (see init in
// child.go); a program that imports the package must not be setuid.
package process
