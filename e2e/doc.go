// Package e2e shows each promise of the project on a kind cluster, one file a promise:
//
//	attested_test.go        an unmodified nginx answers from an enclave, and the client says what it verified
//	mismatch_test.go        a measurement that differs ends the connection before a byte of the request
//	manifest_test.go        what is measured, and that each replica attests what `cloister measure` says
//	replicas_test.go        so do replicas that the API server, a LimitRange, EKS, Istio or Linkerd had a hand in, all the same
//	host_test.go            the host reads nothing, and cannot pass for the enclave
//	hostvalues_test.go      what the kubelet resolves reaches the workload, where the manifest lists it, and nothing else does
//	egress_test.go          the workload reaches what its config names, by name, and nothing else
//	logs_probes_test.go     kubectl logs and probes work as ever
//	hooks_test.go           hooks, restart rules, termination messages and the log of the run before, as ever
//	debug_test.go           kubectl debug: an ephemeral container sees the pod, not what is in the enclave
//	shapes_test.go          a real API server takes every injected pod, and each kind of owner's runs
//	jobs_test.go            so do Jobs and exit codes
//	death_test.go           whatever dies, nobody hangs and the pod serves again
//	admission_test.go       what is left alone, and what is denied
//	policy_test.go          the policy behind the webhook refuses what was not injected, and later changes
//	safe_test.go            certificates, a rollout and an outage under a stream of pods; other injectors; two revisions
//	podsecurity_test.go     what Pod Security enforces, and the seccomp profile for AF_VSOCK
//	doctor_test.go          cloister doctor finds what is broken, and nothing else
//	layers_test.go          images that are wrong, slow or not there
//	sealed_test.go          a sealed EIF runs by digest, and passes for no other
//	images_test.go          tags, pull secrets, and pods that were injected offline
//	rollout_test.go         a rolling restart without a failed request
//	controller_test.go      an autoscaler follows the load inside the enclaves; state shows on pods and owners
//	telemetry_test.go       one request is found as metric, trace and log line, and so is what the workload sends itself; who is no enclave is refused
//	dashboard_test.go       every query of the dashboard has an answer
//	logging_test.go         lines of the workload go where its config says, without the secrets in them
//	oidc_test.go            the authentication plugin oidc with a real Keycloak, and what happens when it is down
//	userplugin_test.go      a plugin as a user would write it, in Python and in its own image
//	kms_test.go             a secret and a certificate by KMS, in the right enclave only
//	kms_localstack_test.go  the same secret by a KMS that others have written
//	client_test.go          any program through the proxy, a client in Python, and the list of pods
//
// `make test-e2e` brings up the cluster, installs what is tested and runs the tests; without
// CLOISTER_E2E=1 they skip. The settings come from the environment, see the type settings.
//
// Programs of the tests' own: testapp is a workload that can be told to misbehave, node runs on the
// cluster's node and plays the untrusted host and clients inside the cluster's network.
package e2e
