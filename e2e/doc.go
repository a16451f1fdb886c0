// Package e2e shows each promise of the project on a kind cluster, one file a promise.
//
// `make test-e2e` brings up the cluster, installs what is tested and runs the tests; without
// CLOISTER_E2E=1 they skip. The settings come from the environment, see the type settings.
//
// Programs of the tests' own: testapp is a workload that can be told to misbehave, node runs on the
// cluster's node and plays the untrusted host and clients inside the cluster.
package e2e
