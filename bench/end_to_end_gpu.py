"""A model's shape with random weights on a GPU: start-up, latency, throughput; Hugging Face beside.

    python -m inlay.bench.end_to_end_gpu --shape llama-3.2-1b [--quantization none fp8]
        [--seconds 420] [--output FILE]

Each item is a line of JSON, the most wanted ones first. Of every precision: the build and the load
by phase; batches of 1 and 64 (128 tokens in, 128 out) with the share of the read probe that
decoding reaches; offline throughput. Of the first one also without CUDA graphs, without overlap. On
the same GPU, in bfloat16: Hugging Face's `generate` (static cache, compiled) and continuous
batching. Of "none" also with plain products chosen by their time (`optimization_level=3`).

What an engine generates is judged before it is timed, after the same tokens, by Hugging Face's
logits: how far below its best one a token's is, in standard deviations of the row. Random weights
make tokens nearly equal, and rounding then chooses another: at most a fraction of one is lost so,
but 4.4 where tokens are chosen at random among 128,256.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.bench import gpu
from inlay.bench.datasets import Request
from inlay.bench.driver import run_offline
from inlay.bench.metrics import Record, span
from inlay.bench.peers.check import distances
from inlay.bench.program_cost import ProgramCost
from inlay.bench.roofline import decode_share
from inlay.bench.shapes import SHAPES, build_shape

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
LENGTHS = ((128, 128), (1000, 1000), (2048, 2048))
"""Input and output tokens, as in TensorRT-LLM's published tables."""
MOST_LOST = {"none": 0.5}
NARROW_LOST = 2.5
"""Standard deviations. Logits that are off by 0.12 of their RMS, more than bfloat16 costs, lose
0.03; by 0.64, as with fp8 in a random network, 0.6."""

Variant = tuple[str, int]
"""Quantization, optimization level."""


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, min(vocab_size, 30000), (count, length), generator=generator)
    return ids.tolist()


def scale_down(model: PreTrainedModel) -> None:
    """Make what layers add to the residual stream smaller with their number, as GPT-2 begins: a
    deep random network else multiplies rounding errors until nothing of the model is left."""
    share = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(share)


class Subject:
    """A model in memory, its engines, and the one of them that is on the GPU at present."""

    model: PreTrainedModel

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device
        self.engines: dict[Variant, Engine] = {}
        self.output_rates: dict[tuple[str, int], float] = {}
        self._open: tuple[Any, LLM] | None = None

    # Items.

    def make(self) -> dict[str, Any]:
        arguments = self.arguments
        self.model = build_shape(arguments.shape, torch.bfloat16, arguments.layers, self.device)
        scale_down(self.model)
        self.vocab_size: int = self.model.config.vocab_size
        self.bandwidth = gpu.read_bandwidth(self.device)
        return {"read_gb_s": self.bandwidth / 1e9}

    def build(self, variant: Variant) -> dict[str, Any]:
        self.close()
        quantization, level = variant
        begin = time.perf_counter()
        engine = self.engines[variant] = compile_model(
            self.model, "inductor", device=self.device, quantization=quantization,
            max_seq_len=4096, max_num_seqs=self.arguments.max_num_seqs, max_num_tokens=8192,
            verify="capture", optimization_level=level,
        )  # fmt: skip
        built = time.perf_counter() - begin
        begin = time.perf_counter()
        self._llm(variant)  # weights, memory, graphs
        return {
            "build_s": built, "build_phases_s": engine.manifest["phases"],
            "start_s": time.perf_counter() - begin, "errors": engine.manifest["errors"],
        }  # fmt: skip

    def latency(self, variant: Variant, batch: int, **options: Any) -> dict[str, Any]:
        requests = self._requests(batch, 128, self.arguments.output_len)
        facts: dict[str, Any] = {"batch": batch, **options}
        llm = self._llm(variant, **options)
        if batch == 1:
            facts["lost_std"] = self._lost(llm, variant[0])
        run_offline(llm, requests, GREEDY)
        runs = [run_offline(llm, requests, GREEDY) for _ in range(3)]
        tpot = median(record.tpot or 0.0 for run in runs for record in run)
        firsts = [max(r.first_token or 0.0 for r in run) - min(r.sent for r in run) for run in runs]
        middle = 128 + self.arguments.output_len // 2
        rate = self._rate(runs)
        self.output_rates.setdefault((variant[0], batch), rate)
        cost = ProgramCost(self.engines[variant])
        share = decode_share(cost, [middle] * batch, tpot, self.bandwidth)
        return facts | {
            "tpot_ms": tpot * 1e3, "ttft_ms": median(firsts) * 1e3, "output_tokens_per_s": rate,
            "decode_share": share, "read_gb_s": self.bandwidth / 1e9,
        }  # fmt: skip

    def throughput(self, variant: Variant, length_in: int, length_out: int) -> dict[str, Any]:
        count = self.arguments.num_requests
        llm = self._llm(variant)
        run_offline(llm, self._requests(8, length_in, 8), GREEDY)
        run = run_offline(llm, self._requests(count, length_in, length_out), GREEDY)
        assert all(record.completed for record in run), "a request failed"
        return {"input_len": length_in, "output_len": length_out, "num_requests": count,
                "output_tokens_per_s": self._rate([run])}  # fmt: skip

    def hf_generate(self, batch: int) -> dict[str, Any]:
        """`generate` with a static cache, whose decode step transformers compiles."""
        length = self.arguments.output_len
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        self._to_gpu()
        try:
            ids = torch.tensor(prompts(batch, 128, self.vocab_size), device=self.device)

            def generate() -> None:
                found = self.model.generate(ids, cache_implementation="static", **options)
                assert found.shape == (batch, 128 + length), f"it gave {tuple(found.shape)}"

            return self._beside(batch, length, generate)
        finally:
            self.model.to("cpu")

    def hf_continuous_batching(self, batch: int) -> dict[str, Any]:
        """Its manager is made and warmed up before; the second of two runs through it is timed."""
        from transformers import GenerationConfig

        length = self.arguments.output_len
        inputs = prompts(batch, 128, self.vocab_size)
        config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1)
        attention = self.model.config._attn_implementation
        self._to_gpu()
        try:
            with self.model.continuous_batching_context_manager(
                generation_config=config, block=True, timeout=5
            ) as manager:

                def generate() -> None:
                    manager.add_requests(inputs, max_new_tokens=length)
                    lengths: list[int] = []
                    while len(lengths) < batch:
                        one = manager.get_result(timeout=60)
                        assert one is not None, "it gave nothing for a minute"
                        assert one.is_finished(), "it streams"
                        lengths.append(len(one.generated_tokens))
                    assert lengths == [length] * batch, f"it gave outputs of {lengths} tokens"

                return self._beside(batch, length, generate)
        finally:
            self.model.set_attn_implementation(attention)
            self.model.to("cpu")

    # Parts.

    def close(self) -> None:
        """Give back the memory of the engine on the GPU."""
        if self._open is not None:
            self._open[1].shutdown()
            self._open = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _llm(self, variant: Variant, **options: Any) -> LLM:
        """Loaded anew only where it is another one than the last."""
        key = (variant, options)
        if self._open is None or self._open[0] != key:
            self.close()
            assert variant in self.engines, "its build failed"
            options = {"in_process": True, "enable_prefix_caching": False, **options}
            self._open = key, LLM(self.engines[variant], **options)
        return self._open[1]

    def _to_gpu(self) -> None:
        self.close()
        self.model.to(self.device)

    def _beside(self, batch: int, length: int, generate: Callable[[], object]) -> dict[str, Any]:
        with torch.inference_mode():
            generate()
            gpu.synchronize(self.device)
            begin = time.perf_counter()
            generate()
            gpu.synchronize(self.device)
        rate = batch * length / (time.perf_counter() - begin)
        over = {
            quantization: ours / rate
            for (quantization, size), ours in self.output_rates.items()
            if size == batch
        }
        return {"batch": batch, "output_tokens_per_s": rate, "inlay_over_it": over}

    def _requests(self, count: int, length_in: int, length_out: int) -> list[Request]:
        return [Request(ids, length_out) for ids in prompts(count, length_in, self.vocab_size)]

    def _rate(self, runs: list[list[Record]]) -> float:
        return median(sum(record.num_output for record in run) / span(run) for run in runs)

    @torch.inference_mode()
    def _lost(self, llm: LLM, quantization: str) -> float:
        """See the module."""
        given = prompts(4, 64, self.vocab_size)
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=16)
        outputs = llm.generate(given, params, use_tqdm=False)
        tokens = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
        whole = torch.cat((torch.tensor(given), tokens), dim=1)
        logits = self.model(whole[:, :-1], logits_to_keep=16).logits
        lost = distances(logits, tokens).mean().item()
        most = MOST_LOST.get(quantization, NARROW_LOST)
        assert lost <= most, f"its tokens are {lost:.2f} standard deviations below the best ones"
        return lost


def items(arguments: argparse.Namespace) -> Iterator[gpu.Item]:
    subject, shape = Subject(arguments), arguments.shape
    yield f"{shape}: model", subject.make
    variants = [(quantization, 0) for quantization in arguments.quantization]
    first, *longer = LENGTHS[: arguments.lengths]
    for variant in variants:
        yield from _of_each(subject, shape, variant)
        name = f"{shape} {variant[0]}: offline {first[0]}/{first[1]}"
        yield name, partial(subject.throughput, variant, *first)
    for option in ({"cuda_graphs": False}, {"overlap": False}):
        for batch in (1, 64):
            name = f"{shape} {variants[0][0]}: batch {batch} with {next(iter(option))} off"
            yield name, partial(subject.latency, variants[0], batch, **option)
    yield f"{shape}: Hugging Face generate", partial(subject.hf_generate, 64)
    name = f"{shape}: Hugging Face continuous batching"
    yield name, partial(subject.hf_continuous_batching, 64)
    for variant in variants:
        for lengths in longer:
            name = f"{shape} {variant[0]}: offline {lengths[0]}/{lengths[1]}"
            yield name, partial(subject.throughput, variant, *lengths)
    if "none" in arguments.quantization:
        yield from _of_each(subject, shape, ("none", 3))
    subject.close()


def _of_each(subject: Subject, shape: str, variant: Variant) -> Iterator[gpu.Item]:
    where = f"{shape} {variant[0]}" + (", products chosen by their time" if variant[1] else "")
    yield f"{where}: build", partial(subject.build, variant)
    for batch in (1, 64):
        yield f"{where}: batch {batch}", partial(subject.latency, variant, batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--quantization", nargs="+", default=["none", "fp8"])
    parser.add_argument("--layers", type=int, help="fewer, to try the script")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--num-requests", type=int, default=512, help="offline")
    parser.add_argument("--output-len", type=int, default=128, help="of the batches")
    parser.add_argument("--lengths", type=int, default=len(LENGTHS), help="first of offline's")
    gpu.add_arguments(parser, seconds=420)
    arguments = parser.parse_args()
    return gpu.run_items("end_to_end_gpu", items(arguments), arguments)


if __name__ == "__main__":
    gpu.exit_with(main)
