# Sourced by run.sh and check.sh: an up-to-date .venv, made with uv where there is one, else with
# python -m venv and pip.  .venv/.installed says what it holds, which makes the second call free.

# ensure_environment ROOT run|test
ensure_environment() {
  local root="$1" purpose="$2"
  unset PYTHONHOME PYTHONPATH # they would make this Python load another one's modules
  if is_installed "$root" "$purpose"; then return; fi
  [ -w "$root" ] || fail "cannot write to $root to make .venv there: copy it to a folder of yours"
  (
    set -euo pipefail
    # A second call at the same time waits, and finds the work done.  Not every file system can lock.
    flock 9 2>/dev/null || true
    if is_installed "$root" "$purpose"; then exit; fi
    install "$root" "$purpose"
  ) 9<"$root"
}

# What is installed for the tests is enough for a run.
is_installed() {
  local stamp
  stamp="$(cat "$1/.venv/.installed" 2>/dev/null)" || return
  [ -x "$1/.venv/bin/python" ] || return
  [ "$stamp" = "$(wanted "$1" "$2")" ] || [ "$stamp" = "$(wanted "$1" test)" ]
}

# A moved or copied checkout needs a .venv of its own: scripts and links hold absolute paths.
wanted() {
  echo "$(cat "$1/pyproject.toml" "$1"/*/*/pyproject.toml "$1/scripts/environment.sh" | cksum) $2"
  echo "$1"
}

install() {
  local root="$1" purpose="$2" venv="$1/.venv" packages
  # These settings install outside the .venv, or leave out packages.
  unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_NO_DEPS PIP_DRY_RUN UV_SYSTEM_PYTHON
  export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
  list_packages "$purpose"
  cd "$root"
  remove_unfinished
  if ! { command -v uv >/dev/null && install_with_uv; }; then install_with_pip; fi
  check_imports
  wanted "$root" "$purpose" >"$venv/.installed"
}

# Fills the array `packages`, with relative paths, because pip interprets some characters of others.
list_packages() {
  packages=(-e ".[chat]" -e ./backends/cpu_simd -e ./backends/hybrid)
  # Without an MPI on the machine, its wheel brings one.
  if command -v mpiexec >/dev/null; then packages+=(-e ./backends/mpi)
  else packages+=(-e "./backends/mpi[mpich]"); fi
  packages+=(-e "./backends/cuda$(cupy_for_the_driver)")
  if [ "$1" = test ]; then
    packages+=(-e ".[dev]" -e "./backends/cuda[nvrtc]" -e ./plugins/lfm2kit-blas)
    packages+=(-e ./plugins/lfm2kit-gguf -e ./plugins/lfm2kit-perplexity)
    packages+=(-e ./plugins/lfm2kit-int8 -e ./plugins/lfm2kit-nccl -e ./plugins/lfm2kit-slices)
    packages+=(-e "./plugins/lfm2kit-trace[nvtx]")
  fi
}

# Removes a .venv that an earlier call made, if it was not finished or has been moved, or if its Python
# is gone.  One that the user made stays, and is installed into.
remove_unfinished() {
  if [ ! -e "$venv/.ours" ]; then return; fi
  if [ ! -x "$venv/bin/python" ] || [ "$(sed -n 2p "$venv/.installed" 2>/dev/null)" != "$root" ]; then
    rm -rf "$venv"
  fi
}

begin() {
  echo "lfm2kit: installing into $venv (once)" >&2
  if [ ! -e "$venv" ]; then
    mkdir "$venv" && : >"$venv/.ours" || return
  fi
  rm -f "$venv/.installed"
}

# Users type `pip install` in this .venv, and uv makes one without pip.
install_with_uv() {
  begin &&
    { [ -x "$venv/bin/python" ] || uv venv --quiet --allow-existing --python ">=3.11" "$venv"; } &&
    uv pip install --quiet --python "$venv/bin/python" "${packages[@]}" pip && return
  echo "lfm2kit: uv could not install it (see above); trying pip" >&2
  remove_unfinished
  return 1
}

install_with_pip() {
  local python
  if [ ! -x "$venv/bin/pip" ]; then python="$(find_python)" || exit; fi
  begin || fail "cannot make $venv"
  [ -x "$venv/bin/pip" ] || make_venv "$python" || fail "$python could not make $venv (see above)"
  # What builds the packages is installed once.  pip would do so for each of them.
  # Python compiles a module when it is first imported, and many never are.
  { pip_install hatchling editables && pip_install --no-build-isolation "${packages[@]}"; } ||
    fail "pip could not install it (see above); PIP_INDEX_URL or PIP_FIND_LINKS names another index"
}

pip_install() {
  "$venv/bin/python" -m pip install --quiet --no-compile "$@"
}

# Without symbolic links, venv copies Python, but still wants its lib64 to be one.
make_venv() {
  local copies=()
  if ln -s lib "$venv/.link" 2>/dev/null; then rm "$venv/.link"
  else mkdir -p "$venv/lib64" && copies=(--copies); fi
  "$1" -m venv ${copies[@]+"${copies[@]}"} "$venv"
}

check_imports() {
  local said
  said="$(unset PYTHONDONTWRITEBYTECODE; "$venv/bin/python" -P \
    -c 'import lfm2kit.cli, lfm2kit_cpu_simd.backend, numba' 2>&1)" ||
    fail "what is installed in $venv does not work: ${said##*$'\n'}"
}

# The extra of the cuda backend that suits the NVIDIA driver; none without a driver.
cupy_for_the_driver() {
  case "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')" in
    "" | [0-9] | 10 | 11) ;;
    12) echo "[cuda12]" ;;
    *) echo "[cuda13]" ;;
  esac
}

# The first Python on the PATH that is new enough and can make a .venv.
find_python() {
  local python without=""
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$python"
      return
    fi
    without="${without:-$python}"
  done
  [ -z "$without" ] || fail "$without has no module venv; on Debian and Ubuntu: apt install $without-venv"
  fail "it needs Python 3.11 or newer, found $(python3 --version 2>/dev/null || echo none); install one"
}

fail() {
  echo "lfm2kit: error: $1" >&2
  exit 2
}
