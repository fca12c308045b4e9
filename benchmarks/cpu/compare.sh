#!/usr/bin/env bash
# cpu_simd against torch and llama.cpp on this machine; arguments go to compare.py:
#   benchmarks/cpu/compare.sh --dtype F32 --only n1,n16 -r 5
# Makes the first time: .venv-peers with the peers (llama.cpp is compiled for this CPU: it needs a
# C++ compiler) and benchmarks/.data with 28 GB of random checkpoints, as safetensors and as GGUF.
#   LFM2KIT_PEERS_ENV   another folder for the environment
#   LFM2KIT_BENCH_DATA  another folder for the checkpoints
#   LFM2KIT_TORCH_INDEX the index with torch for CPUs alone; empty for the configured ones only
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="${LFM2KIT_PEERS_ENV:-$root/.venv-peers}"
export LFM2KIT_BENCH_DATA="${LFM2KIT_BENCH_DATA:-$root/benchmarks/.data}"
source "$root/scripts/environment.sh"

ensure_peers() {
  local index="${LFM2KIT_TORCH_INDEX-https://download.pytorch.org/whl/cpu}" indices=()
  cmp -s "$here/peers.txt" "$venv/.installed-peers" && return
  echo "installing the peers into $venv (once; compiling llama.cpp takes minutes)" >&2
  [ -z "$index" ] || indices=(--extra-index-url "$index")
  [ -x "$venv/bin/pip" ] || "$(find_python)" -P -m venv "$venv"
  # From its source, and for this CPU: a wheel from elsewhere would be slower than it need be.
  CMAKE_ARGS="-DGGML_NATIVE=ON" "$venv/bin/python" -P -m pip install --quiet \
    --disable-pip-version-check --no-binary llama-cpp-python "${indices[@]}" \
    -r "$here/peers.txt" -e "$root" -e "$root/backends/cpu_simd"
  cp "$here/peers.txt" "$venv/.installed-peers"
}

ensure_checkpoint() {
  local folder="$LFM2KIT_BENCH_DATA/wide-6-$1"
  [ -d "$folder" ] || "$venv/bin/lfm2kit" convert wide-6 "$folder" --random --dtype "$1" >&2
  [ -f "$folder.gguf" ] && return
  echo "writing $folder.gguf" >&2
  "$venv/bin/python" "$here/gguf_checkpoint.py" "$folder" "$folder.gguf"
}

ensure_peers
mkdir -p "$LFM2KIT_BENCH_DATA"
for dtype in F32 BF16 F16; do ensure_checkpoint "$dtype"; done
exec "$venv/bin/python" "$here/compare.py" "$@"
