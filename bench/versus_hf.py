"""Inlay beside Hugging Face `generate`: the same checkpoint, dtype, threads and workload, one run.

    python -m inlay.bench.versus_hf [--shape 0.5b] [--threads 2] [--repeats 3]

Outputs are compared first. Two workloads: batch-1 decode (prompt 128, 64 new tokens, the prefill
not counted), and 32 requests with prompts of 32-512 and 64-128 new tokens, where Hugging Face runs
one static left-padded batch to the longest output and is credited the requested tokens only. The
runs are interleaved and the best of each is taken; a ratio is Inlay's tokens/s over Hugging Face's.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from inlay import LLM, SamplingParams
from inlay.bench.roofline import decode_bytes, read_bandwidth
from inlay.bench.shapes import save_shape
from inlay.engine import compile_model

DECODE_PROMPT, DECODE_TOKENS = 128, 64
NUM_REQUESTS = 32
Request = tuple[list[int], int]


def workload(vocab_size: int, seed: int = 0) -> list[Request]:
    """(prompt token ids, new tokens) of the mixed workload."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for _ in range(NUM_REQUESTS):
        length = int(torch.randint(32, 513, (1,), generator=generator))
        num_new = int(torch.randint(64, 129, (1,), generator=generator))
        ids = torch.randint(1, vocab_size, (length,), generator=generator).tolist()
        requests.append((ids, num_new))
    return requests


def _params(num_new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)


def inlay_offline(llm: LLM, requests: list[Request]) -> tuple[float, list[Any]]:
    begin = time.perf_counter()
    params = [_params(num_new) for _, num_new in requests]
    outputs = llm.generate([ids for ids, _ in requests], params, use_tqdm=False)
    assert all(output.error is None for output in outputs), "a request failed"
    return time.perf_counter() - begin, outputs


@torch.inference_mode()
def hf_generate(model: PreTrainedModel, requests: list[Request]) -> float:
    """Seconds of one static, left-padded batch that runs to the longest output."""
    longest = max(len(ids) for ids, _ in requests)
    num_new = max(num_new for _, num_new in requests)
    batch = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in requests])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in requests])
    begin = time.perf_counter()
    model.generate(
        batch, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
    )
    return time.perf_counter() - begin


def inlay_decode(llm: LLM, request: Request) -> float:
    """Decode tokens per second of one request, from its first token to its last."""
    *_, output = llm.stream(request[0], _params(request[1]))
    metrics = output.metrics
    assert metrics.finish_time is not None
    assert metrics.first_token_time is not None
    return (request[1] - 1) / (metrics.finish_time - metrics.first_token_time)


def hf_decode(model: PreTrainedModel, request: Request) -> float:
    """The same: the time of one token's generation is taken off."""
    first = hf_generate(model, [(request[0], 1)])
    return (request[1] - 1) / (hf_generate(model, [request]) - first)


def measure(shape: str, threads: int, repeats: int, backend: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_shape(shape, Path(folder) / shape)
        engine = compile_model(checkpoint, backend, dtype="bfloat16")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        model.generation_config.eos_token_id = None
        llm = LLM(engine, num_threads=threads)
        requests = workload(model.config.vocab_size)
        single = (torch.randint(1, 32000, (DECODE_PROMPT,)).tolist(), DECODE_TOKENS)

        # The outputs first: logits against Hugging Face in float32, beside what bfloat16 costs
        # Hugging Face itself; measured by the build on a chunked, mixed, paged run.
        errors = engine.manifest["errors"]
        assert errors["engine"] <= 1.5 * errors["hugging_face"], errors
        inlay_offline(llm, requests)

        num_new = sum(n for _, n in requests)
        rows: dict[str, list[float]] = {name: [] for name in ("d", "hd", "o", "ho", "bw")}
        for _ in range(repeats):
            rows["bw"].append(read_bandwidth())
            rows["d"].append(inlay_decode(llm, single))
            rows["hd"].append(hf_decode(model, single))
            rows["o"].append(num_new / inlay_offline(llm, requests)[0])
            rows["ho"].append(num_new / hf_generate(model, requests))
        best = {name: max(values) for name, values in rows.items()}
        share = best["d"] * decode_bytes(engine, DECODE_PROMPT) / best["bw"]
    return {
        "bench": "versus_hf",
        "shape": shape,
        "dtype": "bfloat16",
        "backend": backend,
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _cpu_name(),
        "relative_error": round(errors["engine"], 4),
        "hf_relative_error": round(errors["hugging_face"], 4),
        "decode_tokens_per_s": round(best["d"], 2),
        "hf_decode_tokens_per_s": round(best["hd"], 2),
        "decode_ratio": round(best["d"] / best["hd"], 2),
        "offline_tokens_per_s": round(best["o"], 1),
        "hf_offline_tokens_per_s": round(best["ho"], 1),
        "offline_ratio": round(best["o"] / best["ho"], 2),
        "read_gb_s": round(best["bw"] / 1e9, 1),
        "decode_bandwidth_share": round(share, 3),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                flags = torch.backends.cpu.get_cpu_capability()
                return f"{line.partition(':')[2].strip()} ({flags})"
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args()
    print(json.dumps(measure(**vars(arguments))))


if __name__ == "__main__":
    main()
