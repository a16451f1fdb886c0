.DEFAULT_GOAL := help
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.* ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: run
run: ## from nothing to an attested answer of an nginx in an enclave (OBSERVABILITY=1: and its telemetry; CLUSTER=existing: in your kind cluster)
	@hack/run.sh

.PHONY: test
test: ## all tests
	@hack/test.sh

.PHONY: test-unit
test-unit: ## build, verify, lint, and the tests that need no cluster
	@hack/unit.sh

.PHONY: test-e2e
test-e2e: ## the end-to-end tests, on a kind cluster that is made if need be (RUN=TestName: one of them)
	@hack/e2e.sh $(if $(RUN),-run '$(RUN)')

.PHONY: e2e-vm
e2e-vm: ## enclaves in virtual machines, without a cluster (CLOISTER_VM_BYTES=1073741824: so much each way)
	@hack/e2e-vm.sh $(if $(RUN),-run '$(RUN)')

.PHONY: bench-admission
bench-admission: ## the CPU time and allocations of one admission, beside those of injectors by others
	@hack/bench.sh

.PHONY: bench-admission-kind
bench-admission-kind: ## what 300 pods wait for the webhook on the kind cluster, and its memory
	@hack/bench-kind.sh

.PHONY: bench-attestation
bench-attestation: ## the CPU time and allocations of one verification, beside the bare signatures and a verifier by others
	@hack/bench-attestation.sh

.PHONY: bench-eif
bench-eif: ## the user CPU time and memory of building an EIF, beside one SHA-384 and AWS's builder
	@hack/bench-eif.sh

.PHONY: verify
verify: ## format, vet, go.mod, and generated code that is what the .proto files give
	@hack/verify.sh

.PHONY: lint
lint: ## staticcheck
	@hack/lint.sh

.PHONY: generate
generate: ## the Go code of the .proto files
	@hack/generate.sh

.PHONY: cluster
cluster: ## the kind cluster (CLUSTER=existing takes the kind cluster of the current kubeconfig)
	@hack/up.sh cluster

.PHONY: images
images: ## the base EIFs and our images, loaded into the cluster
	@hack/up.sh images

.PHONY: install
install: ## Cloister, the registry and the sample image in the cluster
	@hack/up.sh install

.PHONY: clean
clean: ## no cluster, no engine of ours, no network rule; downloads stay in the cache
	@hack/clean.sh
