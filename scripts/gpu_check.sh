#!/usr/bin/env bash
# What only a GPU can prove, in parts of less than 8 minutes each, without a network:
#     scripts/gpu_check.sh tests|kernels|e2e-1b|e2e-8b [DIRECTORY]
# Needs torch with CUDA, Triton, transformers and pytest; nothing is installed. Results are lines of
# JSON in DIRECTORY (bench/results), each written as its item ends. What takes longer than there is
# time is told as skipped: QUANTIZATION=fp8 or none makes e2e parts do one precision alone.
set -euo pipefail
part=${1:-}
case $part in
    tests | kernels | e2e-1b | e2e-8b) ;;
    *) echo "which part? tests, kernels, e2e-1b or e2e-8b; given '$part'" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${2:-$root/bench/results}"
out=$(cd "${2:-$root/bench/results}" && pwd)
cd "$root"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
export INLAY_CACHE_DIR=${INLAY_CACHE_DIR:-$(mktemp -d)}

"$python" - << 'EOF' || exit 2
import importlib.util, sys
if missing := [n for n in ("torch", "transformers", "pytest") if not importlib.util.find_spec(n)]:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}; PYTHON names another one")
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU here")
print(torch.__version__, torch.cuda.get_device_name())
EOF

run_tests() { # shard, files...
    SHARD=$1 JSON_LINES=$out/gpu_tests.jsonl OMP_NUM_THREADS=2 timeout 460 "$python" -m pytest \
        -o addopts= -q --strict-markers -p tests.json_lines -m gpu --show-capture=no "${@:2}"
}

status=0
case $part in
    tests) # side by side: most of the time goes into compiling, one core for each
        for name in llama gemma2 qwen3_moe gpt_oss "quantized or narrow"; do
            run_tests 0/1 tests/test_gpu.py -k "$name" & jobs+=($!)
        done
        for shard in 0 1 2 3; do
            run_tests $shard/4 tests/kernels/test_attention_gpu.py & jobs+=($!)
        done
        for shard in 0 1; do
            run_tests $shard/2 tests/kernels/test_triton_gpu.py & jobs+=($!)
        done
        for job in "${jobs[@]}"; do wait "$job" || status=$?; done
        ;;
    kernels)
        timeout 250 "$python" -m inlay.bench.attention_gpu --seconds 200 \
            --output "$out/attention_gpu.jsonl" || status=$?
        timeout 220 "$python" -m inlay.bench.products_gpu --seconds 180 \
            --output "$out/products_gpu.jsonl" || status=$?
        ;;
    e2e-1b)
        timeout 470 "$python" -m inlay.bench.end_to_end_gpu --shape llama-3.2-1b --seconds 400 \
            --quantization ${QUANTIZATION:-none fp8} --output "$out/end_to_end_gpu.jsonl" || status=$?
        ;;
    e2e-8b)
        timeout 475 "$python" -m inlay.bench.end_to_end_gpu --shape llama-3.1-8b --seconds 400 \
            --quantization ${QUANTIZATION:-fp8 none} --output "$out/end_to_end_gpu.jsonl" || status=$?
        ;;
esac
exit $status
