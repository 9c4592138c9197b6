#!/usr/bin/env bash
# What waits for a GPU, but for vLLM and several GPUs, once, into one JSON: benchmarks/on_gpu.py says what. Under 8 minutes on one GPU with 40 GB or more.
#
#   benchmarks/on_gpu.sh -o gpu.json            # on a machine with a GPU, in this repository, after `make setup`
#   benchmarks/on_gpu.sh --small -o small.json  # the same script's small form, on a CPU, in under 90 s
#   PYTHON=/path/to/python benchmarks/on_gpu.sh -o gpu.json
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || { echo "on_gpu.sh: $python is not there; run make setup, or say PYTHON=/path/to/python" >&2; exit 2; }
# nothing here needs the network, and nothing may wait for it
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/on_gpu.py" "$@"
