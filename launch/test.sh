#!/usr/bin/env bash
# Installs the test extra into .venv, then runs linter, formatter, type checker and all tests but the slow ones.
#
#   bash launch/test.sh [pytest arguments …]      e.g. bash launch/test.sh -k weights; -m slow for the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh
.venv/bin/python -m pip install --quiet --editable '.[test]'

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -m "not slow" --numprocesses=logical --maxprocesses=4 --dist=loadfile "$@"
