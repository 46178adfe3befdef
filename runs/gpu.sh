#!/usr/bin/env bash
# Shows the GPU side on the GPU of this machine, within eight minutes.
#
#   runs/gpu.sh [--out FOLDER] [--dry-run]
#
#   install      the libraries: as they are, from a wheel in dist/, or built with this machine's nvcc
#   info         versions, the device, which backends serve it
#   correctness  every operator in both backends against the reference, on a side stream, on a second
#                device, in a CUDA graph; the optimisers and scores, and that they do not wait
#   operators    share of a device copy's bandwidth at the sizes of Llama-3-8B, Qwen3-14B and
#                Gemma-3-12B, beside eager PyTorch, torch.compile and Liger where it is installed
#   optimisers   a step of MaskedAdamW beside torch's fused AdamW
#   attribute    beside the backbone's forward, on 1 B and 8 B of random weights
#   training     a step of 1 B with a fifth of the units, and with 7 % of them frozen
#   sanitizer    one large call of every operator under compute-sanitizer, where there is one
#
# Each has its own time, and what it did is kept when that ends: FOLDER (default: build/gpu) has
# gpu.json, and gpu.md, which is a page for docs/results. Run again, it does what is missing. Ends
# with 1 if anything failed or is missing. --dry-run does a little of everything on the CPU; its record
# is of no use to the GPU, so give it a folder of its own, such as --out build/gpu-dry.
#
# Environment: PYTHON, one with torch (default: that of .venv, or else python3); CUDA_HOME
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu "$@"
