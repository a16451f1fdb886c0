#!/bin/bash
# Usage: python.sh REQUIREMENTS. Prints the interpreter of a virtual environment in the cache that holds
# exactly the packages of the file, which pins them all.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
requirements=$1
venv=$CACHE/venv/$( (python3 -c 'import sys; print(sys.version)' && cat "$requirements") | sha256sum | cut -c1-16)
mkdir -p "$CACHE/venv"
exec 9>"$venv.lock"
flock 9
if [ ! -e "$venv/complete" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv" >&2
  "$venv/bin/python" -m pip install -q --no-deps --only-binary :all: -r "$requirements" >&2
  touch "$venv/complete"
fi
echo "$venv/bin/python"
