#!/bin/bash
# `make run`: from nothing to an attested answer. OBSERVABILITY=1 adds the collector and the servers behind it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
"$HACK/up.sh" install
use_engine
use_cluster
again="read the log, then run the same command again: what is done stays done"
if [ "${OBSERVABILITY:-}" = 1 ]; then
  step "images collector, VictoriaLogs, Prometheus, Jaeger" "$again" "$HACK/images.sh" collector victorialogs prometheus jaeger
  step "certificate of the collector" "$again" "$HACK/observability.sh" identity
fi
step "sample: measurements from YAML and EIF" "read the log" "$HACK/sample.sh" measure
if [ "${OBSERVABILITY:-}" = 1 ]; then
  step "collector and servers in the cluster" "$again" "$HACK/observability.sh" deploy "$OUT/nginx.measurements.json"
fi
step "sample: nginx in an enclave" "kubectl -n cloister-sample describe pods" "$HACK/sample.sh" deploy
if [ "${OBSERVABILITY:-}" = 1 ]; then
  step "collector and servers are ready" "kubectl -n cloister-observability describe pods" "$HACK/observability.sh" wait
fi
"$HACK/sample.sh" verify
cat <<TEXT

Ready in $SECONDS s. The answer came from inside the enclave: cloister curl checked the registers above
against a set computed from $OUT/nginx.yaml and $OUT/base-dev.eif,
in the handshake of the very connection that carried the page.

Where each box is
  webhook            https://cloister-webhook.cloister-system.svc, asked by the API server at every new pod
  controller         kubectl get --raw '/apis/custom.metrics.k8s.io/v1beta2/namespaces/cloister-sample/pods/*/enclave_memory_utilization'
  confidential pods  cloister status -A
  sample             https://nginx.cloister-sample.svc, inside the cluster
  metrics            port 14022 of each confidential pod; port 8080 of webhook and controller
  image registry     http://registry.cloister-registry.svc.cluster.local:5000, inside the cluster
TEXT
if [ "${OBSERVABILITY:-}" = 1 ]; then
  cat <<TEXT
  collector          kubectl -n cloister-observability port-forward svc/otel-collector 4317 8888   # OTLP of attested enclaves only; its own metrics
  Prometheus         kubectl -n cloister-observability port-forward svc/prometheus 9090            # http://127.0.0.1:9090
  Jaeger             kubectl -n cloister-observability port-forward svc/jaeger 16686               # http://127.0.0.1:16686
  VictoriaLogs       kubectl -n cloister-observability port-forward svc/victorialogs 9428          # http://127.0.0.1:9428/select/vmui
  dashboard          manifests/dashboards/cloister.json, to import in a Grafana of yours with this Prometheus
TEXT
else
  echo "  collector, Prometheus, Jaeger, VictoriaLogs: make run OBSERVABILITY=1"
fi
cat <<TEXT
  Egress, plugins and KMS work in each enclave whose EnclaveConfig names them: docs/plugins.md, docs/kms.md.

What to try next
  export PATH=$BIN:\$PATH${KUBECONFIG:+ KUBECONFIG=$KUBECONFIG}${DOCKER_HOST:+ DOCKER_HOST=$DOCKER_HOST}
  kubectl -n cloister-sample get pods                     # 3 of 3: console, initboot, sidecar
  kubectl -n cloister-sample logs deploy/nginx -c nginx   # nginx's own access log
  kubectl -n cloister-sample port-forward svc/nginx 8443:443 &
  cloister curl -v --measurements $OUT/nginx.measurements.json \\
    --root $CACHE/dev-root/root.pem --connect-to 127.0.0.1:8443 https://nginx.cloister-sample.svc/
  # Change one digit of a PCR in the measurement set and ask again: no byte of the request is sent.
  # Add an env value to $OUT/nginx.yaml, apply it and ask again: PCR16 differs.
  cloister doctor   # is all of it well, and what keeps pods from their enclaves
TEXT
if [ "$CLUSTER" = existing ]; then
  cat <<TEXT
  make test CLUSTER=existing    # all tests
  # Take everything away again, the cluster stays; with OBSERVABILITY=1 also the namespace cloister-observability:
  kubectl delete namespace cloister-sample cloister-registry && kubectl delete -k $OUT/install
TEXT
else
  cat <<TEXT
  make test         # all tests
  make clean        # take everything away again
TEXT
fi
