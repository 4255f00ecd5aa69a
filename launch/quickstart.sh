#!/usr/bin/env bash
# From a clone to a fine-tuned model: makes .venv, installs einkorn, fetches SmolLM2-135M-Instruct, teaches it to turn
# messages into JSON (sft), or to be brief, by preferences (dpo) or by rewards (grpo), or to read handwritten digits in
# pictures (vl_sft, and vl_grpo that goes on from it), and shows its answers before and after.
#
#   bash launch/quickstart.sh [cpu|cuda|tpu] [sft|dpo|grpo|vl_sft|vl_grpo] [--key value …]
#
# Without words it is cpu and sft; further arguments go to `einkorn train`. Needs Python 3.11 or newer (or one named by
# PYTHON) and no accelerator. What it takes and what to expect stands at the head of
# configs/quickstart/sft.yaml, dpo.yaml, grpo.yaml, vl_sft.yaml and vl_grpo.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=gguf
task=sft
while [[ $# -gt 0 && $1 != -* ]]; do
    case $1 in
        cpu) extras=gguf ;;
        cuda | tpu) extras=gguf,$1 ;;
        sft | dpo | grpo | vl_sft | vl_grpo) task=$1 ;;
        *)
            echo "quickstart.sh: '$1' is neither a device nor a task; allowed: cpu, cuda, tpu, sft, dpo, grpo, vl_sft, vl_grpo" >&2
            exit 2
            ;;
    esac
    shift
done

bash launch/venv.sh
.venv/bin/python -m pip install --quiet --editable ".[${extras}]"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # launch/cli.py says why
exec .venv/bin/python -m launch.quickstart "${task}" "$@"
