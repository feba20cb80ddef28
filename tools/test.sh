#!/usr/bin/env bash
# The tests.   bash tools/test.sh [quick] [pytest arguments]
#
#   quick      leaves out the tests marked slow
#   -n 0       (a pytest argument) one process, for a debugger
#
# Ends with pytest's own summary and exit code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
if [ "${1:-}" = quick ]; then
    selection=(-m "not slow")
    shift
fi

. tools/env.sh --extras test

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Every worker is one process on one core; more threads would only fight.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"
# Compiled code of an earlier run must not hide a failure.
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"

# loadfile: a file's tests run in one worker, so its module fixtures (captures, compiled models) are made once;
# loadscope would send each test class of a file to another worker and make them again. Files come as tests/conftest.py
# orders them; xdist's own order, by number of tests, begins the longest file last.
status=0
python -m pytest -n "${PEFT_FX_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@" || status=$?
exit "$status"
