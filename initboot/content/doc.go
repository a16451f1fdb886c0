// Package content serves the workload's image to its enclave, over HTTP behind the enclave's secret:
//
//	GET /manifests/<digest>   an index or a manifest, with its media type
//	GET /blobs/<digest>       a config or a layer that a manifest served before names
//
// What is asked for comes from the image's registry, anonymously, and stays in a cache on disk. An error
// is one sentence as text: 404 when the registry does not have it, 502 otherwise. The enclave verifies
// every digest itself; the server does so to keep its cache right and to refuse early.
package content
