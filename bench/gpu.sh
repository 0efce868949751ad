#!/usr/bin/env bash
# Everything that needs a GPU, in steps of less than eight minutes: first what is right, then what is fast.
#
#     bench/gpu.sh                               # from the source tree, nothing installed; into runs/gpu
#     bench/gpu.sh runs/gpu tests.kernels        # one step
#     bench/gpu.sh runs/gpu kernels.sample generate.qwen2.5-3b
#
# Every row is written to STEP.txt when it is measured, so a step that is cut off has lost nothing; STEP.json is its end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
out=${1:-runs/gpu}
shift || true

steps=(tests.kernels tests.engine kernels.sample kernels.linear_cross_entropy kernels.decode_attention kernels.rows)
for shape in qwen2.5-3b llama-3.2-3b qwen2.5-0.5b llama-3.2-1b; do
  steps+=("generate.$shape" "train.$shape")
done

chosen=("${@:-${steps[@]}}")
for step in "${chosen[@]}"; do
  [[ " ${steps[*]} " == *" $step "* ]] || { echo "bench/gpu.sh: no step $step; the steps are ${steps[*]}" >&2; exit 2; }
done
[[ " ${steps[*]} " == *" $out "* ]] && { echo "bench/gpu.sh: name a folder before the step $out" >&2; exit 2; }
mkdir -p "$out"

status=0
for step in "${chosen[@]}"; do
  part=${step#*.}
  case $step in
    tests.kernels) command=(-m pytest -v -m "not slow" tests/kernels) ;;
    tests.engine) command=(-m pytest -v -m "not slow" tests/minem/model/test_model.py tests/minem/generation tests/minem/em/test_scoring.py) ;;
    kernels.*) command=(bench/kernels.py --only "$part" --no-compile --json) ;;
    generate.*) command=(bench/generate.py --shape "$part" --json) ;;
    train.*) command=(bench/train.py --shape "$part" --profile --json) ;;
  esac
  echo "$step: python3 ${command[*]}"
  if [[ $step == tests.* ]]; then
    timeout 470 python3 "${command[@]}" 2>&1 | tee "$out/$step.txt" | tail -n 40 || status=1
  else
    timeout 470 python3 "${command[@]}" 2>&1 >"$out/$step.json" | tee "$out/$step.txt" || status=1
  fi
done
exit $status
