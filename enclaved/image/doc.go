// Package image gets a workload's image into a directory: it fetches index, manifest, configuration
// and layers by digest from a source that nobody trusts, verifies every byte before it is used, and
// unpacks the layers so that nothing is ever created outside that directory.
package image
