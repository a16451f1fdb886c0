#!/bin/bash
# Builds, into the cache, what the end-to-end tests run beside Cloister itself. It needs no cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
again="read the log, then run the same command again: what is done stays done"
step "Keycloak $KEYCLOAK_VERSION" "$again" "$HACK/keycloak.sh" build
step "LocalStack" "$again" "$HACK/localstack.sh" build
step "example plugin in Python" "$again" "$HACK/pathguard.sh" build
step "collector's distribution" "$again" "$HACK/collector.sh"
step "VictoriaLogs, Prometheus, Jaeger" "$again" "$HACK/observability.sh" build
