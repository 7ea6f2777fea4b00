#!/usr/bin/env bash
# Makes the virtual environment and installs requirements/BUILD.txt and this project into it.
#   bash requirements/install.sh cpu|cuda VENV [PYTHON]
# Called by the Makefile, which skips it while VENV/.installed-BUILD is newer than the requirement files.
set -euo pipefail

build="$1" venv="$2" python="${3:-}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { echo "error: $*" >&2; exit 1; }

requirements="$here/requirements/$build.txt"
[ -f "$requirements" ] || fail "BUILD=$build: expected cpu or cuda"

for other in cpu cuda; do
    if [ "$other" != "$build" ] && [ -e "$venv/.installed-$other" ]; then
        fail "$venv holds the $other build and BUILD=$build was asked for: run 'make clean-venv' first, or give another VENV="
    fi
done

# The versions of MIN_PYTHON and MAX_PYTHON in hstu/_matrix.py.
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

if [ -x "$venv/bin/python" ]; then
    supported "$venv/bin/python" || fail "$venv has a Python that is not 3.11 or 3.12, or is broken: run 'make clean-venv' first"
else
    if [ -n "$python" ]; then
        supported "$python" || fail "PYTHON=$python does not run or is not Python 3.11 or 3.12: give one of these"
    else
        for candidate in python3 python python3.12 python3.11; do
            if supported "$candidate"; then python="$candidate"; break; fi
        done
        if [ -z "$python" ]; then
            fail "no Python 3.11 or 3.12 found (looked for python3, python, python3.12, python3.11): install one, or give PYTHON=/path/to/python3.11"
        fi
    fi
    echo "making $venv with $("$python" --version) ($python)"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed: install the venv module (Debian, Ubuntu: apt install python3-venv)"
fi

echo "installing requirements/$build.txt into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$requirements"

# pip's index settings may have brought PyTorch's CUDA build, which cannot be loaded without its CUDA libraries.
if [ "$build" = cpu ] && "$venv/bin/python" - <<'PY'
import sys
from importlib.metadata import requires
sys.exit(not any(r.startswith(("nvidia-", "cuda-")) for r in requires("torch") or []))
PY
then
    echo "pip chose PyTorch's CUDA build: adding its CUDA libraries (about 2 GB); README.md says how to get the small CPU build"
    libraries="$(mktemp)"
    trap 'rm -f "$libraries"' EXIT
    grep -E '^(nvidia|cuda)-' "$here/requirements/cuda.txt" > "$libraries"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$libraries"
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$here"
"$venv/bin/python" -W ignore -c 'import torch, hstu; print(f"installed: torch {torch.__version__}")'
touch "$venv/.installed-$build"
