#!/usr/bin/env bash
# Makes .venv in the repository's root where there is none, with python3 or the interpreter that PYTHON names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if [[ ! -x .venv/bin/python ]]; then
    if ! "${python}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "einkorn needs Python 3.11 or newer, which '${python}' is not; set PYTHON=python3.12, say" >&2
        exit 2
    fi
    "${python}" -m venv .venv
fi
