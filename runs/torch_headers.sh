#!/usr/bin/env bash
# Compiles every source that includes torch against the headers of a release, without installing
# it: does the oldest torch that is declared still build the libraries?
#
#     runs/torch_headers.sh [VERSION [FOLDER]]     default: 2.10.0, build/torch-VERSION
#
# FOLDER keeps the headers. They are taken from the wheel for macOS, which is the smallest: the
# stable ABI has the same headers on every platform. CUDA sources are compiled by nvcc for one
# architecture where it is there, and otherwise as C++ against tests/emulation/include.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-2.10.0}
folder=${2:-build/torch-$version}
python=${PYTHON:-.venv/bin/python}
nvcc=$(command -v nvcc || true)

if [ ! -d "$folder/torch/include" ]; then
  mkdir -p "$folder"
  "$python" -m pip download --quiet --no-deps --dest "$folder" --python-version 3.11 \
    --platform macosx_11_0_arm64 --only-binary=:all: "torch==$version"
  "$python" - "$folder" <<'PYTHON'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.startswith("torch/include/")]
    archive.extractall(folder, names)
wheel.unlink()
PYTHON
fi

flags=(-std=c++17 -DTORCH_TARGET_VERSION=0x020a000000000000 "-I$folder/torch/include")
flags+=("-DSSAH_TORCH_VERSION=\"$version\"")
compiled=0
for source in csrc/register.cpp csrc/cpu/*.cpp; do
  "${CXX:-c++}" "${flags[@]}" -fsyntax-only -fvisibility=hidden "$source"
  compiled=$((compiled + 1))
done
for source in csrc/cuda/*.cu; do
  if [ -n "$nvcc" ]; then
    "$nvcc" "${flags[@]}" -DUSE_CUDA -arch=sm_80 -c "$source" -o /dev/null
  elif [ "$source" != csrc/cuda/register_cuda.cu ]; then # which no emulation needs
    "${CXX:-c++}" "${flags[@]}" -DUSE_CUDA -fsyntax-only -w -Itests/emulation/include -Icsrc/cuda \
      -x c++ "$source"
  else
    continue
  fi
  compiled=$((compiled + 1))
done
echo "torch $version: $compiled sources compile${nvcc:+, CUDA by $nvcc}"
