#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then the benchmarks. One folder holds all output.
#
#     bench/gpu.sh [FOLDER]                      # from the source tree, nothing installed; runs/gpu by default
#     SHAPES=qwen2.5-3b LIMIT=300 bench/gpu.sh   # one shape, at most 300 seconds for each benchmark
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
out=${1:-runs/gpu}
mkdir -p "$out"
status=0

python3 -m pytest -q tests/kernels tests/minem/model/test_model.py tests/minem/generation tests/minem/em/test_scoring.py \
  -m "not slow" \
  2>&1 | tee "$out/tests.txt" || status=1
timeout "${LIMIT:-600}" python3 bench/kernels.py --json 2>"$out/kernels.txt" >"$out/kernels.json" || status=1
for shape in ${SHAPES:-qwen2.5-3b llama-3.2-3b qwen2.5-0.5b llama-3.2-1b}; do
  timeout "${LIMIT:-600}" python3 bench/generate.py --shape "$shape" --json \
    2>"$out/generate.$shape.txt" >"$out/generate.$shape.json" || status=1
  timeout "${LIMIT:-600}" python3 bench/train.py --shape "$shape" --profile --json \
    2>"$out/train.$shape.txt" >"$out/train.$shape.json" || status=1
done
tail -n 40 "$out"/*.txt
exit $status
