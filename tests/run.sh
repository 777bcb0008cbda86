#!/usr/bin/env bash
# Sets up like run.sh, then runs the test suite. Arguments go to pytest: tests/run.sh -m slow,
# or after an edit of the tables: tests/run.sh -m "not recipe"
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
. ./setup.sh
add_tests
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n auto --maxprocesses=4 --dist=worksteal "$@"
