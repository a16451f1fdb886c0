# shellcheck shell=bash
# Sourced by what compares with AWS's library for EIFs: build_peer builds hack/eif-peer as $PEER, for which
# cargo and a C compiler must be there. The library's client of KMS makes the first build take many minutes.
PEER=$OUT/eif-peer/release/eif-peer
build_peer() { CARGO_TARGET_DIR=$OUT/eif-peer CGO_ENABLED=1 cargo build -q --release --locked --manifest-path "$HACK/eif-peer/Cargo.toml"; }
