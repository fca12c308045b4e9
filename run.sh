#!/usr/bin/env bash
# The graded command:  ./run.sh -v
# Makes .venv and installs lfm2kit into it the first time, then runs `lfm2kit run` with your
# arguments:  ./run.sh -v -n 128 --backend hybrid
# The assignment's whole scheme, as a report:  ./run.sh --grade --html report.html
# On several nodes, which Slurm allocates where there is one:  NODES=4 ./run.sh -v
set -euo pipefail
name=run
if [ "${1-}" = --grade ]; then name=grade; shift; fi
root="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)"
source "$root/scripts/environment.sh"
ensure_environment "$root" run
# Signals wait until lfm2kit handles them: while Python starts, they would end in a traceback.
blocked=(env --block-signal=INT,TERM,HUP)
"${blocked[@]}" true 2>/dev/null || blocked=()
# Not .venv/bin/lfm2kit, whose first line cannot name every path.
command=(${blocked[@]+"${blocked[@]}"} "$root/.venv/bin/python" -P -m lfm2kit "$name")
if [ -n "${NODES:-}" ]; then
  source "$root/scripts/nodes.sh"
  on_nodes "$NODES" "${command[@]}"
fi
exec "${command[@]}" "$@"
