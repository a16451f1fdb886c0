// Package sealed names what the second ramdisk of a sealed EIF holds, as paths below the root. It holds
// constants only: the command that writes them and the enclave that reads them share it.
package sealed

const (
	// Dir holds everything. An enclave that finds it is sealed.
	Dir = "cloister"
	// Manifest is the workload manifest in its RFC 8785 form.
	Manifest = Dir + "/manifest.json"
	// Image is an OCI layout (OCI image-spec, image-layout.md) with the images of the workload and its plugins.
	Image = Dir + "/image"
)
