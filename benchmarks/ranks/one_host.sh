#!/usr/bin/env bash
# What is to be measured of ranks with a GPU each on one host, 2 or 4 of them:
#
#     benchmarks/ranks/one_host.sh RANKS FOLDER [STEP ...]
#
# Writes tables and pages to FOLDER, and how long each step took to FOLDER/steps.txt.  Without any,
# all steps run, one after the other.  A step that fails or takes more than $LIMIT (or 600) seconds
# is named, and the next one runs.
#
#   write     LFM2-8B-A1B at random, on the disk at $FULL (or /tmp/lfm2-8b-a1b): 17 GB
#   speed     samples/s and bits of all kinds of exchange past the host, a layer's alone, auto's choice
#   bits      1, 3, 16 and 128 samples in three precisions, with --trim, and on a rank less
#   host      cuda and hybrid with tokens through the host
#   skew      what a load and replicas bring where some experts are hot
#   bytes     whether ranks send what follows from the routing
#   planner   what a calibration of two ranks predicts for RANKS
#   lines     the time lines of cuda and hybrid with tokens through the host
#   faults    the tests of the exchange with a GPU for each rank, faults and memory among them
set -uo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
ranks="${1:?how many ranks}" out="$(realpath -m "${2:?a folder for the tables}")"
shift 2
full="${FULL:-/tmp/lfm2-8b-a1b}"
mkdir -p "$out"

gpus() { python "$here/gpus.py" --ranks "$ranks" "$@"; }

write() { [ -e "$full" ] || python "$here/../cuda/write_full_size.py" "$full"; }

speed() { gpus -n 16,32,64,128 --kinds dp,ep,pairs,nccl --precisions fp32,bf16; }

bits() {
  gpus -n 1,3,16,128 --kinds dp,ep,pairs --precisions fp32,bf16,fp16 -r 1 --only-bits
  gpus -n 1,3,16,128 --kinds ep,pairs --precisions fp32,bf16,fp16 -r 1 --only-bits --trim
  if [ "$ranks" -gt 2 ]; then
    ranks=$((ranks - 1)) gpus -n 1,3,16,128 --kinds ep --precisions fp32,bf16,fp16 -r 1 --only-bits
  fi
}

host() { gpus -n 16,64,128 --kinds host,hybrid --precisions fp32 -r 3 --only-bits; }

skew() { python "$here/skew.py" --ranks "$ranks" -n 64; }

bytes() {
  for exchange in device host; do
    python "$here/predicted.py" --bytes "$ranks" --backend cuda --exchange "$exchange"
  done
}

planner() {
  local load="$out/load.json" precision
  for precision in fp32 bf16; do
    local rates="$out/rates-$precision.json" how=(-m "$full" -b cuda --precision "$precision")
    lfm2kit calibrate "${how[@]}" --ranks 2 --output "$rates"
    [ -e "$load" ] ||
      lfm2kit run "${how[@]}" --random-inputs 16 -n 64 --seed 1 --record-load "$load"
    lfm2kit plan "${how[@]}" --rates "$rates" --load "$load" --ep-size 2 --simulate \
      "ranks=1/$ranks,per-node=$ranks,n=16/32/64/128,tokens=16,placement=order" \
      --json "$out/planned-$precision.json"
  done
}

lines() {
  for backend in cuda hybrid; do
    lfm2kit profile -m "$full" -b "$backend" --ranks "$ranks" --parallel ep --exchange host \
      -n 64 -r 3 --html "$out/$backend-through-host.html"
  done
}

faults() { python -m pytest -q -m gpu "$here/../../tests/cuda/test_exchange_on_gpu.py" -k "each"; }

[ $# -gt 0 ] || set -- write speed bits host skew bytes planner lines faults
for step in "$@"; do
  start=$SECONDS
  export -f gpus "$step"
  export here ranks out full
  timeout "${LIMIT:-600}" bash -c "$step" >"$out/$step.md" 2>"$out/$step.log"
  echo "$step: exit code $?, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
done
