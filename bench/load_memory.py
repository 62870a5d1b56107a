"""What loading and compiling cost in memory, as a share of the checkpoint: the aim is below 1.3.

    python -m inlay.bench.load_memory [--megabytes 800]

Random weights in a few wide layers, in shards. Each row is a process of its own; its peak resident
memory (VmHWM: mapped files count where they were touched) less that of the same process with a
tiny model, over the larger of the checkpoint and the model in the dtype asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT = 1.3
VOCABULARY = 8192

PROCESS = """
import sys
phase, checkpoint, dtype, target = sys.argv[1:]
if phase == "load":
    from inlay.lowering.loading import load_source
    model = load_source(checkpoint, dtype).model
    total = sum(p.float().sum() for p in model.parameters())  # touches every weight
    assert total == total
else:
    from pathlib import Path
    from inlay.engine import build
    from inlay.lowering.options import CompileOptions
    build(checkpoint, Path(target), CompileOptions(backend="eager", dtype=dtype))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""Prints the peak in KiB. VmHWM starts anew with the program, unlike getrusage's maximum."""


def save_wide(folder: Path, megabytes: int, dtype: torch.dtype, shard: str = "200MB") -> Path:
    """A llama of about this many megabytes, written tensor by tensor; less than 1 is a tiny one."""
    width = 1536 if megabytes else 64
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY if megabytes else 128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sizes = {n: p.numel() * p.element_size() for n, p in layer.named_parameters()}
    a_layer = sum(size for name, size in sizes.items() if ".layers." in name)
    rest = sum(sizes.values()) - a_layer
    config.num_hidden_layers = max(round((megabytes * 1e6 - rest) / a_layer), 1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 * parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def peak(phase: str, checkpoint: Path, dtype: str) -> int:
    """Peak resident bytes of a process that loads, or compiles with eager."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "INLAY_CACHE_DIR": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        arguments = [phase, str(checkpoint), dtype, f"{scratch}/engine"]
        command = [sys.executable, "-c", PROCESS, *arguments]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1]) * 1024


def checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(phase: str, big: Path, tiny: Path, dtype: str, factor: float = 1) -> dict[str, Any]:
    """A row. factor: how much larger the model is in this dtype than its checkpoint, at least 1."""
    extra = peak(phase, big, dtype) - peak(phase, tiny, dtype)
    size = checkpoint_bytes(big)
    return {
        "phase": phase,
        "to": dtype,
        "checkpoint_mb": round(size / 1e6),
        "extra_peak_mb": round(extra / 1e6),
        "ratio": round(extra / (size * factor), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=800, help="of the checkpoint (800)")
    megabytes = parser.parse_args().megabytes
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for stored, wanted in (
            ("bfloat16", ("bfloat16", "float32")),
            ("float32", ("bfloat16", "float32")),
        ):
            dtype = getattr(torch, stored)
            big = save_wide(Path(scratch) / stored, megabytes, dtype)
            tiny = save_wide(Path(scratch) / f"{stored}-tiny", 0, dtype)
            for to in wanted:
                factor = 2 if (stored, to) == ("bfloat16", "float32") else 1
                for phase in ("load", "compile"):
                    rows.append({"from": stored, **measure(phase, big, tiny, to, factor)})
    facts = {
        "bench": "load_memory",
        "backend": "eager",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "limit": LIMIT,
        "rows": rows,
        "within_limit": all(row["ratio"] < LIMIT for row in rows),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
