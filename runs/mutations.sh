#!/usr/bin/env bash
# One-line faults in a copy of the checkout, all of which the tests must catch: see mutations.py.
set -euo pipefail
cd "$(dirname "$0")"
exec ../.venv/bin/python mutations.py "$@"
