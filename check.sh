#!/usr/bin/env bash
# All checks:  ./check.sh  (lint, types, tests).  Arguments go to pytest:  ./check.sh -k router
# The tests that need a CUDA device, alone:  ./check.sh --gpu
# Makes .venv and installs lfm2kit and what the tests need into it the first time.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)"
source "$root/scripts/environment.sh"
ensure_environment "$root" test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
python -m ruff check .
python -m ruff format --check .
python -m mypy
if [ "${1:-}" = --gpu ]; then
  shift
  exec python -m pytest -m gpu -rs "$@"
fi
# Two workers share the cores: idle threads must sleep, not spin.
export OMP_WAIT_POLICY=PASSIVE
python -m pytest -n 2 --dist loadfile --timeout 300 "$@"
