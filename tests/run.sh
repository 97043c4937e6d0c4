#!/usr/bin/env bash
# Runs what CI runs: style and types, all tests, the oldest and newest installations. tests/run.sh ARGUMENTS runs pytest alone.
# Installs into .venv-test and fetches the real models.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(bash tests/install.sh)
bash tests/material.sh "$bin/python"
pytest=("$bin/python" -m pytest -m "slow or not slow")
if [ $# -gt 0 ]; then
  exec "${pytest[@]}" "$@"
fi
BIN=$bin bash tests/check.sh
"${pytest[@]}"
bash tests/matrix.sh --reduced
