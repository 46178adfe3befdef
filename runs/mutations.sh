#!/usr/bin/env bash
# One-line faults in a copy of the checkout, all of which the tests must catch: see mutations.py.
set -euo pipefail
here=$(dirname "$0")
exec "$here/../.venv/bin/python" "$here/mutations.py" "$@"
