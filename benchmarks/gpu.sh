#!/usr/bin/env bash
# Everything that a GPU is wanted for, in one unattended script: `gpu.py` says what, and in which parts.
#
#   benchmarks/gpu.sh [--wheels FOLDER] [--rehearse] [--results FOLDER] [part1 ... part5]
#
# Needs an image with torch 2.11 or newer, numpy, pyarrow, timm and transformers; the rest comes as wheels from FOLDER, which
# `make wheels` fills: nothing is fetched. Parts take at most eight minutes each; a part that is given alone adds to the same results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      site=$(mktemp -d)  # beside what the image has, which stays as it is
      "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$2" --target "$site" -r benchmarks/wheels.txt
      export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if ! "$python" -c 'import importlib.metadata; importlib.metadata.version("vitscale")' 2>/dev/null; then
  "$python" setup.py --quiet egg_info  # ranks compare the versions of what is installed
fi
if ! "$python" -c 'import vitscale._pixels' 2>/dev/null; then
  "$python" setup.py --quiet build_ext --inplace || echo "without vitscale._pixels: loading takes its slower road" >&2
fi
if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv; fi
"$python" benchmarks/gpu.py "${arguments[@]}"
