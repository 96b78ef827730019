#!/usr/bin/env bash
# Runs the GPU check with the machine's own python3 and the wheels that pack.sh collected.
#
#   tools/gpu_check/run.sh WHEELS --out FOLDER [options of python -m tools.gpu_check]
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels="$1"
shift
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" "$wheels"/*.whl
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python3 -W ignore -m tools.gpu_check "$@"
