#!/bin/bash
# Generates the Go code of every .proto file. Usage: generate.sh [FOLDER] (default: beside the .proto).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
# tool NAME MODULE VERSION: builds a pinned tool into the cache once.
tool() {
  local dir=$CACHE/tools/$1-$3
  [ -x "$dir/$1" ] || GOBIN=$dir go install "$2@$3"
  PATH=$dir:$PATH
}
tool buf github.com/bufbuild/buf/cmd/buf "$BUF_VERSION"
tool protoc-gen-go google.golang.org/protobuf/cmd/protoc-gen-go "$PROTOC_GEN_GO_VERSION"
tool protoc-gen-go-grpc google.golang.org/grpc/cmd/protoc-gen-go-grpc "$PROTOC_GEN_GO_GRPC_VERSION"
buf generate --output "${1:-.}"
