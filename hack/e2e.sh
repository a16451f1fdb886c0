#!/bin/bash
# Usage: e2e.sh [GO-TEST-FLAG...]. Brings the cluster up and runs the end-to-end tests in it. What the
# tests need to know lies in $OUT/e2e.env, so that one test can be run by hand:
#
#	set -a; . ~/.cache/cloister/out/e2e.env; set +a; go test -count=1 -v -run TestName ./e2e/...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
step "host packages" "install them by hand: see the list in hack/packages.sh" "$HACK/packages.sh"
"$HACK/e2e-servers.sh"
"$HACK/up.sh" install
use_engine
use_cluster
again="read the log, then run the same command again: what is done stays done"
step "Keycloak on the node" "$again" "$HACK/keycloak.sh" load
step "LocalStack on the node" "$again" "$HACK/localstack.sh" load
step "example plugin in the registry" "$again" "$HACK/pathguard.sh" push
step "images collector, VictoriaLogs, Prometheus, Jaeger" "$again" "$HACK/images.sh" collector victorialogs prometheus jaeger
. "$OUT/images.env"
cat >"$OUT/e2e.env" <<ENV
CLOISTER_E2E=1
KUBECONFIG=${KUBECONFIG:-$HOME/.kube/config}
DOCKER_HOST=${DOCKER_HOST:-}
CLOISTER_NODE=$KIND_CLUSTER-control-plane
CLOISTER_BIN=$BIN/cloister
CLOISTER_EIF=$OUT/base-dev.eif
CLOISTER_ROOT=$CACHE/dev-root/root.pem
CLOISTER_KEY=$CACHE/dev-root/key.pem
CLOISTER_NGINX_IMAGE=registry.cloister-registry.svc.cluster.local:5000/nginx@$(cat "$OUT/nginx.digest")
CLOISTER_KEYCLOAK_IMAGE=$(cat "$OUT/keycloak.image")
CLOISTER_LOCALSTACK_IMAGE=$(cat "$OUT/localstack.image")
CLOISTER_PATHGUARD_IMAGE=registry.cloister-registry.svc.cluster.local:5000/pathguard@$(cat "$OUT/pathguard.digest")
CLOISTER_COLLECTOR_IMAGE=$COLLECTOR_IMAGE
CLOISTER_PROMETHEUS_IMAGE=$PROMETHEUS_IMAGE
CLOISTER_JAEGER_IMAGE=$JAEGER_IMAGE
CLOISTER_VICTORIALOGS_IMAGE=$VICTORIALOGS_IMAGE
ENV
set -a
. "$OUT/e2e.env"
[ -n "$DOCKER_HOST" ] || unset DOCKER_HOST
set +a
cd "$REPO"
exec go test -count=1 -v -timeout 45m "$@" ./e2e/...
