#!/usr/bin/env bash
# Makes .venv-test, installs the package with pinned dependencies, fetches the real models, runs the tests, one process a core: tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv-test/bin/python ] || "$python" -m venv .venv-test
venv=.venv-test/bin
export PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
"$venv/pip" install -q "$(grep '^torch==' tests/constraints.txt)"
"$venv/pip" install -q -c tests/constraints.txt -e '.[test]'
bash tests/material.sh "$venv/python"
exec "$venv/python" -m pytest -n logical --maxprocesses 8 -m "slow or not slow" "$@"
