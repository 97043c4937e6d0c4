#!/usr/bin/env bash
# Runs all tests, slow ones too, one process a core: tests/run.sh [pytest arguments]. Installs into .venv-test and fetches the real models.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(bash tests/install.sh)
bash tests/material.sh "$bin/python"
exec "$bin/python" -m pytest -n logical --maxprocesses 8 -m "slow or not slow" "$@"
