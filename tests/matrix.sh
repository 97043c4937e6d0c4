#!/usr/bin/env bash
# Installs and tries the package with many versions of Python and its libraries, and writes docs/compatibility.md: tests/matrix.sh.
# --reduced: two installations, nothing written, as in CI. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tests/support/matrix.py "$@"
