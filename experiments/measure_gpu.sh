#!/usr/bin/env bash
# Everything that this project measures on one GPU. Steps resume: what has a record is not run again.
#
#   experiments/measure_gpu.sh              cells, confirm: about ten minutes on an H100
#   experiments/measure_gpu.sh kernels      further steps by name, each a run of its own
#   BUDGET_S=540 experiments/measure_gpu.sh stop before so many seconds; the next run goes on
#
#   cells       gradients in bf16, then full-width layers at 32K and 128K: memory, time, MFU
#   confirm     allocated (equal to the byte), reserved and NVML beside a phantom device; needs no GPU
#   kernels     attention kernels, packed documents, offload (overlapped, blocking, off), allocator
#   flash_attn  the same with packages flash-attn, where they are installed
#   longer      256K tokens and up, until it does not fit
#   records     commit what there is to results/reference/, by hand afterwards
#
# Options for `alst` go into ALST_OPTIONS, such as --allow-dirty.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
read -r -a options <<<"${ALST_OPTIONS:-}"
deadline=$((SECONDS + ${BUDGET_S:-86400}))
alst() { "$python" -m harness "$@"; }

# Within the budget. An interrupted cell leaves no record.
within() {
  local left=$((deadline - SECONDS))
  if ((left < 20)); then
    echo "measure_gpu: no time left for: $*" >&2
    exit 0
  fi
  timeout --signal=INT --kill-after=20 "$left" "$python" -m harness "$@" || failed $? "$@"
}

failed() {
  local code=$1
  shift
  case $code in
  124 | 130 | 137) echo "measure_gpu: out of time in: $*; run it again to go on" >&2 && exit 0 ;;
  *) echo "measure_gpu: exit code $code of: $*" >&2 && exit "$code" ;;
  esac
}

# The experiments name one hardware row; on another, copies of them do.
row=$(alst devices | head -n 1 | cut -f 1)
if [[ -z $row || $row == - ]]; then
  echo "measure_gpu: no file in harness/cells/hardware/rows is for this GPU; see 'alst devices' and add one" >&2
  exit 2
fi

experiment() {
  local name=$1
  if [[ $row != h100-80gb ]]; then
    sed "s/h100-80gb/$row/" "experiments/$name.yaml" >"experiments/${name}_$row.yaml"
    name=${name}_$row
  fi
  echo "$name"
}

measure() { within run "experiments/$(experiment "$1").yaml" "${options[@]}"; }

step() {
  echo "measure_gpu: $1 on $row"
  case $1 in
  cells) measure gpu_single ;;
  confirm) alst confirm "$(experiment gpu_single)" || echo "measure_gpu: see the table above" >&2 ;;
  kernels) measure gpu_kernels ;;
  flash_attn) measure gpu_flash_attn ;;
  longer) measure gpu_longer ;;
  records)
    for name in gpu_single gpu_kernels gpu_longer; do
      name=$(experiment "$name")
      if compgen -G "results/cells/$name/*.json" >/dev/null; then
        alst reference "$name" --partial --reason "First measurement on $row"
      fi
    done
    ;;
  *)
    echo "measure_gpu: unknown step '$1'; see the head of $0" >&2
    exit 2
    ;;
  esac
}

for name in "${@:-cells confirm}"; do
  for each in $name; do step "$each"; done
done
