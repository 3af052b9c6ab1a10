#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 8 minutes; needs no network and installs nothing.
#
#     bash benchmarks/run_gpu.sh [FOLDER]          # FOLDER: benchmarks/results/gpu
#     DEVICE=cpu bash benchmarks/run_gpu.sh /tmp/x # tiny and not compiled: to see that the script works
#     bash benchmarks/run_gpu.sh FOLDER --only xl  # some of the parts
#
# Needs a checkout and a python3 of 3.11 or newer (PYTHON=... names another) with torch 2.11 or newer for CUDA, numpy,
# networkx, safetensors, rich, typer and matplotlib. Without diffusers or cache-dit, the rows that need them say so.
# A checkout without git says which commit it is by TCC_COMMIT=...
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${1:-$root/benchmarks/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# tcc as it would be installed: passes/ and export/ are packages inside it
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -R "$root/tcc" "$site/tcc"
cp -R "$root/passes" "$site/tcc/passes"
cp -R "$root/export" "$site/tcc/export"

cd "$root"
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
  TORCHINDUCTOR_CACHE_DIR="$site/inductor" \
  "$python" benchmarks/run_gpu.py --results "$out" --device "${DEVICE:-cuda}" "${@:2}"
