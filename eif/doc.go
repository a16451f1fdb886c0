// Package eif reads, measures, writes, signs and verifies AWS Enclave Image Files, version 4.
//
// An EIF is a header with a table of sections (kernel, command line, ramdisks, metadata, signature)
// and a checksum. The reader is stricter than AWS's: it accepts only files that are one gapless run
// of listed sections, so that what is measured is all there is. Everything streams; memory does not
// grow with the file.
//
// Sources: aws-nitro-enclaves-image-format, src/defs/mod.rs, src/defs/eif_hasher.rs and
// src/utils/mod.rs; aws-nitro-enclaves-cli docs/image_signing.md.
package eif
