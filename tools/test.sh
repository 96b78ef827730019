#!/usr/bin/env bash
# Installs the package with its test tools into a virtual environment and runs the tests.
# VENV names the environment (default .venv); arguments go to pytest, as in `tools/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --editable '.[test]'
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
