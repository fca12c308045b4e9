#!/usr/bin/env bash
# All checks:  ./check.sh  (lint, types, tests).  Arguments go to pytest:  ./check.sh -k router
# Those, the tests marked `long`, and many more random inputs:  ./check.sh --long
# The tests that need a CUDA device, alone:  ./check.sh --gpu
# Makes .venv and installs lfm2kit and what the tests need into it the first time.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)"
source "$root/scripts/environment.sh"
ensure_environment "$root" test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
# Tests start hundreds of processes: none is to compile all of lfm2kit anew.
unset PYTHONDONTWRITEBYTECODE
python -m ruff check .
python -m ruff format --check .
if [ "${1:-}" = --gpu ]; then
  shift
  python -m mypy
  exec python -m pytest -m gpu -rs "$@"
fi
# mypy uses one core alone for long, so it runs beside the tests.  What it says comes last.
said="$(mktemp)"
python -m mypy >"$said" 2>&1 &
types=$! sources=
trap 'kill "$types" $sources 2>/dev/null || true; rm -f "$said"' EXIT
trap 'exit 130' INT
chosen=(-m "not long" --timeout 300)
if [ "${1:-}" = --long ]; then
  shift
  chosen=(--timeout 3600)
  export LFM2KIT_BATCHES="${LFM2KIT_BATCHES:-10000}"
  export LFM2KIT_FUZZ_EXAMPLES="${LFM2KIT_FUZZ_EXAMPLES:-5000}"
  export LFM2KIT_MIXTURES="${LFM2KIT_MIXTURES:-2000}"
fi
# Workers share the cores: idle threads must sleep, not spin.  There are three for two cores, because
# the one that has the jobs of ranks often waits.
export OMP_WAIT_POLICY=PASSIVE
# With an empty cache, workers first compile the CPU's kernels, one after another.  The other core then
# compiles CUDA's sources, which their tests find in the cache.
if [ $# = 0 ]; then
  python -m pytest -q -p no:cacheprovider "${chosen[@]}" tests/cuda/test_compiling.py >/dev/null 2>&1 &
  sources=$!
fi
# In the order of tests/conftest.py, and not the files with most tests first.
code=0
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${chosen[@]}" "$@" || code=$?
wait "$types" || code=$((code ? code : $?))
cat "$said"
exit "$code"
