#!/usr/bin/env bash
# What every launcher starts on every host: sets the chip's flags, says who the others are, then trains, from the last
# checkpoint in output_dir where there is one. Ends with the code of `einkorn train` (launch/README.md has the table).
#
#   bash launch/worker.sh launch/env/CHIP.env -c FILE [--key value …]
#
# PYTHON names the interpreter (python3). EINKORN_SECRETS may name a file of NAME=value lines that is read first, and
# EINKORN_PID a file with the number of the process of an earlier start, which is ended before this one begins.
set -euo pipefail

flags=${1:?usage: bash launch/worker.sh launch/env/CHIP.env -c FILE [--key value …]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

set -o allexport
if [[ -n ${EINKORN_SECRETS:-} && -f ${EINKORN_SECRETS} ]]; then
    # shellcheck disable=SC1090 # the user's own
    source "${EINKORN_SECRETS}"
fi
# shellcheck disable=SC1090 # one of launch/env
source "${flags}"
set +o allexport

# Kubernetes numbers the pods of a job; where the job says where they meet, that is all there is to know.
if [[ -n ${EINKORN_COORDINATOR:-} && -n ${JOB_COMPLETION_INDEX:-} ]]; then
    export EINKORN_PROCESS=${JOB_COMPLETION_INDEX}
fi
if [[ ${EINKORN_PROCESSES:-} == 1 ]]; then # alone, there is nobody to meet
    unset EINKORN_COORDINATOR EINKORN_PROCESSES EINKORN_PROCESS
fi

if [[ -n ${EINKORN_PID:-} ]]; then
    former=$(cat "${EINKORN_PID}" 2> /dev/null || true)
    if [[ -n ${former} ]] && grep -qz train "/proc/${former}/cmdline" 2> /dev/null && kill -TERM "${former}" 2> /dev/null; then # it saves, then stops
        for ((second = 0; second < 120; second++)); do
            kill -0 "${former}" 2> /dev/null || break
            sleep 1
        done
        kill -KILL "${former}" 2> /dev/null || true
    fi
    echo "$$" > "${EINKORN_PID}"
fi

export PYTHONPATH=${root}${PYTHONPATH:+:${PYTHONPATH}}
exec "${PYTHON:-python3}" -m launch train "$@" --training.try_resume_from_last_checkpoint true
