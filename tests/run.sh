#!/usr/bin/env bash
# Sets up like run.sh, then runs the test suite. Arguments go to pytest: tests/run.sh -m slow,
# or after an edit of the tables: tests/run.sh -m "not recipe"
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
. ./setup.sh
if ! "$PYTHON" -c 'import matplotlib, pytest, ruff, scipy, xdist' 2>/dev/null; then
    if [ "$PYTHON" != .venv/bin/python ]; then  # leave the active Python as it is
        "$PYTHON" -m venv --system-site-packages .venv
        PYTHON=.venv/bin/python
        serves "$PYTHON" || "$PYTHON" -m pip install --quiet --requirement requirements.txt
    fi
    "$PYTHON" -m pip install --quiet --requirement tests/requirements.txt --requirement records/requirements.txt
fi
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n auto --maxprocesses=4 --dist=worksteal "$@"
