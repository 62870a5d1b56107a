#!/usr/bin/env bash
# What only a GPU can prove, in parts of less than 8 minutes each, without a network:
#     scripts/gpu_check.sh tests|kernels|e2e-1b|e2e-8b [DIRECTORY]
# Needs torch with CUDA, Triton, transformers and pytest; nothing is installed. Results are lines of
# JSON in DIRECTORY (bench/results), each written as its item ends.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?"which part? tests, kernels, e2e-1b or e2e-8b"}
out=${2:-bench/results}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
export INLAY_CACHE_DIR=${INLAY_CACHE_DIR:-$(mktemp -d)}

case $part in
    tests)
        JSON_LINES=$out/gpu_tests.jsonl timeout 470 python -m pytest -o addopts= -q --strict-markers \
            -p tests.json_lines -m gpu --show-capture=no \
            tests/test_gpu.py tests/kernels/test_attention_gpu.py tests/kernels/test_triton_gpu.py
        ;;
    kernels)
        python -m inlay.bench.attention_gpu --seconds 220 --output "$out/attention_gpu.jsonl"
        python -m inlay.bench.products_gpu --seconds 200 --output "$out/products_gpu.jsonl"
        ;;
    e2e-1b)
        python -m inlay.bench.end_to_end_gpu --shape llama-3.2-1b --seconds 420 \
            --output "$out/end_to_end_gpu.jsonl"
        ;;
    e2e-8b)
        python -m inlay.bench.end_to_end_gpu --shape llama-3.1-8b --seconds 400 \
            --quantization fp8 none --output "$out/end_to_end_gpu.jsonl"
        ;;
    *)
        echo "unknown part $part: tests, kernels, e2e-1b or e2e-8b" >&2
        exit 2
        ;;
esac
