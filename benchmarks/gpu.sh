#!/usr/bin/env bash
# Tests and benchmarks on one GPU, 8 minutes at most; the last line of stdout is JSON. Needs no network and no installed
# softprompt. See gpu.py for what is measured.
#
#     benchmarks/gpu.sh [--cache FOLDER] [--output FILE] [--seconds 470] [--toy]
#
# PYTHON names the interpreter; without it: the project's .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu.py "$@"
