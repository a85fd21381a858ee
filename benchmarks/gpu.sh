#!/usr/bin/env bash
# Everything of benchmarks/gpu.py on a machine that may have no internet.
#
#   benchmarks/gpu.sh [--wheels=DIR] [flags of benchmarks/gpu.py]
#
# With --wheels a new environment is made of that directory's wheels alone. On a
# machine with internet and the same Python and platform it is filled by
#   pip wheel -w DIR -r benchmarks/gpu_requirements.txt
# Without it, the Python at hand (or $PYTHON) must have dpo_jax's dependencies.
# --output is gpu.json unless given; `--size=tiny` checks the script anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
wheels=""
rest=()
output=(--output=gpu.json)
for argument in "$@"; do
  case "$argument" in
    --wheels=*) wheels="${argument#*=}" ;;
    --output=*) output=("$argument") ;;
    *) rest+=("$argument") ;;
  esac
done
if [[ -n "$wheels" ]]; then
  environment="$(mktemp -d)"
  trap 'rm -rf "$environment"' EXIT
  "$python" -m venv "$environment"
  python="$environment/bin/python"
  "$python" -m pip install --quiet --no-index --find-links="$wheels" \
    -r benchmarks/gpu_requirements.txt
fi
export HF_HUB_OFFLINE=1
"$python" -m benchmarks.gpu "${output[@]}" ${rest[@]+"${rest[@]}"}
