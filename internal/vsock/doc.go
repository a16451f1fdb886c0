// Package vsock carries byte streams between an enclave and its host, over AF_VSOCK or over hybrid
// unix sockets, and lets both ends of a stream prove that they belong together.
//
// Hybrid sockets are Firecracker's (docs/vsock.md there): one unix socket stands for all ports of the
// guest. The host connects to it, writes "CONNECT <port>\n" and reads "OK <number>\n"; from then on the
// stream is the guest's. The guest reaches host port P at the socket's path followed by "_P".
//
// Vsock is not namespaced: every pod of a node reaches every port of every enclave. So no stream
// carries anything before both ends have proven that they know the enclave's secret (see Dial and
// Listen of Secret).
package vsock
