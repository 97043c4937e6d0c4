#!/usr/bin/env bash
# Makes .venv-test with the package and all extras, in the versions of constraints.txt: tests/install.sh. Prints the folder of its programs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv-test/bin
export PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
[ -x "$bin/python" ] || "${PYTHON:-python3}" -m venv .venv-test
# An unchanged list of requirements is installed already.
wanted=$(cat setup.cfg pyproject.toml tests/constraints.txt)
if [ "$wanted" != "$(cat .venv-test/installed 2>/dev/null)" ]; then
  "$bin/pip" install -q "$(grep '^torch==' tests/constraints.txt)" >&2
  "$bin/pip" install -q -c tests/constraints.txt -e '.[test]' >&2
  echo "$wanted" > .venv-test/installed
fi
echo "$PWD/$bin"
