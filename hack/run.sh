#!/bin/bash
# `make run`: from nothing to an attested answer.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
"$HACK/up.sh" install
use_engine
use_cluster
step "sample: nginx in an enclave" "kubectl -n cloister-sample describe pods" "$HACK/sample.sh" deploy
step "sample: measurements from YAML and EIF" "read the log" "$HACK/sample.sh" measure
"$HACK/sample.sh" verify
cat <<TEXT

Ready in $SECONDS s. The answer came from inside the enclave: cloister curl checked the registers above
against a set computed from $OUT/nginx.yaml and $OUT/base-dev.eif,
in the handshake of the very connection that carried the page.

What to try next
  export PATH=$BIN:\$PATH${KUBECONFIG:+ KUBECONFIG=$KUBECONFIG}${DOCKER_HOST:+ DOCKER_HOST=$DOCKER_HOST}
  kubectl -n cloister-sample get pods                     # 3 of 3: console, initboot, sidecar
  kubectl -n cloister-sample logs deploy/nginx -c nginx   # nginx's own access log
  kubectl -n cloister-sample port-forward svc/nginx 8443:443 &
  cloister curl -v --measurements $OUT/nginx.measurements.json \\
    --root $CACHE/dev-root/root.pem --connect-to 127.0.0.1:8443 https://nginx.cloister-sample.svc/
  # Change one digit of a PCR in the measurement set and ask again: no byte of the request is sent.
  # Add an env value to $OUT/nginx.yaml, apply it and ask again: PCR16 differs.
  make test     # all tests
  make clean    # take everything away again
TEXT
