#!/usr/bin/env bash
# From a clone to a fine-tuned model: makes .venv, installs einkorn, fetches SmolLM2-135M-Instruct, teaches it to turn
# messages into JSON, and shows its answers before and after.
#
#   bash launch/quickstart.sh [cpu|cuda|tpu] [--key value …]      default: cpu; further arguments go to `einkorn train`
#
# Needs Python 3.11 or newer (or one named by PYTHON) and no accelerator. What it takes and what to expect stands in
# configs/quickstart/sft.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cpu
if [[ $# -gt 0 && $1 != -* ]]; then
    device=$1
    shift
fi
case ${device} in
    cpu) extras=gguf ;;
    cuda | tpu) extras=gguf,${device} ;;
    *)
        echo "quickstart.sh: '${device}' is no device; allowed: cpu, cuda, tpu" >&2
        exit 2
        ;;
esac

bash launch/venv.sh
.venv/bin/python -m pip install --quiet --editable ".[${extras}]"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # launch/cli.py says why
exec .venv/bin/python -m launch.quickstart "$@"
