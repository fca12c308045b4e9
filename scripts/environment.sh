# Sourced by run.sh and check.sh: an up-to-date .venv, made with uv where there is one, else with
# python -m venv and pip.  A stamp of what was installed makes the second call free.

# ensure_environment ROOT run|test
ensure_environment() {
  local root="$1" purpose="$2" venv="$1/.venv" stamp wanted
  stamp="$venv/.installed-for-$purpose"
  wanted="$(cat "$root"/pyproject.toml "$root"/*/*/pyproject.toml "$root/scripts/environment.sh" | cksum) $root"
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "lfm2kit: installing into $venv (once)" >&2
  local packages=(-e "$root" -e "$root/backends/cpu_simd" -e "$root/backends/hybrid")
  # Without an MPI on the machine, its wheel brings one.
  if command -v mpiexec >/dev/null; then packages+=(-e "$root/backends/mpi")
  else packages+=(-e "$root/backends/mpi[mpich]"); fi
  packages+=(-e "$root/backends/cuda$(cupy_for_the_driver)")
  if [ "$purpose" = test ]; then
    packages+=(-e "$root[dev]" -e "$root/backends/cuda[nvrtc]" -e "$root/plugins/lfm2kit-blas" -e "$root/plugins/lfm2kit-trace")
  fi
  if command -v uv >/dev/null; then
    [ -x "$venv/bin/python" ] || uv venv --quiet --python ">=3.11" "$venv"
    uv pip install --quiet --python "$venv/bin/python" "${packages[@]}"
  else
    [ -x "$venv/bin/pip" ] || "$(find_python)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  fi
  echo "$wanted" >"$stamp"
}

# The extra of the cuda backend that suits the NVIDIA driver; none without a driver.
cupy_for_the_driver() {
  case "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')" in
    "" | [0-9] | 10 | 11) ;;
    12) echo "[cuda12]" ;;
    *) echo "[cuda13]" ;;
  esac
}

# The first Python on the PATH that is new enough.
find_python() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "lfm2kit: error: it needs Python 3.11 or newer, found $(python3 --version 2>&1); install one" >&2
  return 2
}
