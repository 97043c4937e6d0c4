#!/usr/bin/env bash
# Checks style, format and types: tests/check.sh. $BIN names the programs of another venv than .venv-test.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-$(bash tests/install.sh)}
failed=0
"$bin/ruff" check --output-format concise . || failed=1
"$bin/ruff" format --check . || failed=1
"$bin/mypy" || failed=1
exit $failed
