# Sourced by run.sh, tests/run.sh and bench/gpu.sh: sets PYTHON to one that has the requirements, in .venv if the active
# one has not; there with those of records/, for statistics and plots.

serves() {
    "$1" - >/dev/null 2>&1 <<'PY'
import huggingface_hub, numpy, sympy, tiktoken, tqdm, torch
assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
PY
}

# add_tests: gives PYTHON what the tests need, too; in .venv, as the active one is left as it is.
add_tests() {
    if "$PYTHON" -c 'import matplotlib, pytest, ruff, scipy, xdist' 2>/dev/null; then return; fi
    if [ "$PYTHON" != .venv/bin/python ]; then
        "$PYTHON" -m venv --system-site-packages .venv
        PYTHON=.venv/bin/python
        serves "$PYTHON" || "$PYTHON" -m pip install --quiet --requirement requirements.txt
    fi
    "$PYTHON" -m pip install --quiet --requirement tests/requirements.txt --requirement records/requirements.txt
}

PYTHON=$(command -v python3 || command -v python || true)
if [ -z "$PYTHON" ]; then
    echo "no python3 was found: install Python 3.10 or newer" >&2
    exit 2
fi
if [ -x .venv/bin/python ] && serves .venv/bin/python; then
    PYTHON=.venv/bin/python
elif ! serves "$PYTHON"; then
    version=$("$PYTHON" -V 2>&1)
    case "$version" in
        "Python 2."* | "Python 3."[0-9].*) echo "$version is too old: install Python 3.10 or newer" >&2; exit 2 ;;
    esac
    echo "setting up .venv from requirements.txt (once; some minutes, most of it PyTorch)" || true  # nobody may read it
    "$PYTHON" -m venv .venv
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install --quiet --requirement records/requirements.txt --requirement requirements.txt
fi
