#!/usr/bin/env bash
# The graded command:  ./run.sh -v
# Makes .venv and installs lfm2kit into it the first time, then runs `lfm2kit run` with your
# arguments:  ./run.sh -v -n 128 --backend hybrid
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/environment.sh"
ensure_environment "$root" run
# Not .venv/bin/lfm2kit, whose first line cannot name every path.
exec "$root/.venv/bin/python" -P -m lfm2kit run "$@"
