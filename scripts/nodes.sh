# Sourced by run.sh: a command on as many nodes as NODES says, with a rank on each.

# on_nodes N COMMAND...  fills the array `command` with what starts COMMAND with N ranks.  Slurm
# allocates whole nodes, unless this is an allocation already; SALLOC_PARTITION, SALLOC_GRES and the
# like choose which.  Its mpiexec starts the ranks, so that it does not matter which MPI that is.
on_nodes() {
  local nodes="$1" allocated="${SLURM_JOB_NUM_NODES:-0}"
  shift
  case "$nodes" in
    0* | *[!0-9]* | ???????*) fail "NODES=$nodes: expected a number of nodes, such as NODES=4" ;;
  esac
  command=("$@" --ranks "$nodes")
  if [ -z "${SLURM_JOB_ID:-}" ] && command -v salloc >/dev/null; then
    # Exit code 1 would say that the result is INVALID.
    export SLURM_EXIT_ERROR=2
    command=(salloc --nodes "$nodes" --ntasks-per-node 1 --exclusive "${command[@]}")
  elif [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "lfm2kit: NODES=$nodes, but there is no Slurm here: mpiexec places the $nodes ranks" >&2
  elif [ "$allocated" -lt "$nodes" ]; then
    fail "NODES=$nodes, but this allocation of Slurm has $allocated; leave NODES out, or allocate more"
  fi
}
