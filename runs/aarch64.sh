#!/usr/bin/env bash
# Builds the CPU kernels for AArch64 and runs the operator tests on them under an emulator: a whole
# AArch64 Python with torch, on an x86-64 machine.
#
#     runs/aarch64.sh [FOLDER]     default: build/aarch64; keeps what was downloaded and built
#
#     ALL=1        test_opcheck too, which tests our Python and takes as long as all the rest
#     PYTHON=...   the interpreter whose pip downloads; default: .venv/bin/python
#
# Needs Debian with qemu-user and g++-aarch64-linux-gnu, which root gets installed, 1.2 GB of disk
# and, for the first run on two cores, about five minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=${PYTHON:-$checkout/.venv/bin/python}
mkdir -p "${1:-build/aarch64}"
folder=$(cd "${1:-build/aarch64}" && pwd)
# The floor, and the last release whose wheel for AArch64 on PyPI is a CPU build. It needs ARMv8.2;
# our kernels are compiled for ARMv8.0.
torch=torch==2.10.0
processor=neoverse-n1

if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
  [ "$(id -u)" = 0 ] || { echo "Install qemu-user and g++-aarch64-linux-gnu" >&2; exit 1; }
  apt-get -qq update
  apt-get -qq install -y --no-install-recommends qemu-user g++-aarch64-linux-gnu >/dev/null
fi

# Python of this Debian's release, with all that it depends on, unpacked: nothing is installed.
root=$folder/root
if [ ! -e "$root/complete" ]; then
  mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$root"
  touch "$folder/apt/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
    -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status"
    -o Dir::Cache="$folder/apt/cache" -o APT::Install-Recommends=false)
  "${apt[@]}" update
  "${apt[@]}" install -y --download-only python3 libstdc++6
  for package in "$folder"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  touch "$root/complete"
fi
version=$(basename "$(readlink "$root/usr/bin/python3")")

packages=$folder/packages
if [ ! -e "$packages/complete" ]; then
  rm -rf "$packages"
  # pip would choose the dependencies for this machine: they are named instead.
  "$python" -m pip --quiet --disable-pip-version-check install --no-deps --target "$packages" \
    --python-version "${version#python}" --only-binary=:all: --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "$torch" filelock fsspec jinja2 markupsafe mpmath networkx numpy sympy typing-extensions \
    hypothesis iniconfig packaging pluggy pygments pytest setuptools sortedcontainers
  touch "$packages/complete"
fi

# Tests start Python again by sys.executable, which is what -0 says. Other programs that it starts,
# the compiler among them, run on this machine.
emulated=$folder/python
cat >"$emulated" <<SCRIPT
#!/bin/sh
PYTHONHOME=$root/usr PYTHONPATH=$packages:\$PYTHONPATH exec qemu-aarch64 -0 $emulated \\
  -cpu $processor -L $root $root/usr/bin/$version "\$@"
SCRIPT
chmod +x "$emulated"

# A copy of the sources, for the library here has the same name. Its build/ is kept.
tree=$folder/tree
mkdir -p "$tree"
rm -rf "$tree"/{csrc,ssah,ssah_kernels,tests}
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
  tar --create --null --files-from=- | tar --extract --directory "$tree"
cd "$tree"
export OMP_NUM_THREADS=1
SSAH_CUDA=0 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ MAX_JOBS=${MAX_JOBS:-2} \
  "$emulated" setup.py -q build_ext --inplace >"$folder/build.log" 2>&1 ||
  { cat "$folder/build.log" >&2; exit 1; }

"$emulated" -W ignore - <<'CHECK'
import platform, torch
from ssah_kernels.backends import cpu
facts = cpu.facts()
print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}: {facts}")
assert (platform.machine(), facts["isa"]) == ("aarch64", "neon"), "these are not the NEON kernels"
CHECK

# Two processes, as an emulated one starts slowly. The plug-ins that the options of pyproject.toml
# belong to are not there.
pytest=("$emulated" -m pytest -o addopts= -p no:cacheprovider -p no:randomly -q -ra)
[ -n "${ALL:-}" ] || pytest+=(--deselect tests/kernels/test_ops.py::test_opcheck)
"${pytest[@]}" tests/kernels/test_ops.py >"$folder/test_ops.log" 2>&1 &
operators=$!
failed=0
"${pytest[@]}" tests/kernels/test_conversions.py tests/kernels/test_masked_update.py || failed=1
wait "$operators" || failed=1
cat "$folder/test_ops.log"
exit "$failed"
