"""What throughput, latency and serve-load have in common: flags, the engine, facts, the table."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay.bench import conditions, datasets, metrics, model, roofline
from inlay.bench.driver import Watch, run_offline
from inlay.bench.program_cost import ProgramCost
from inlay.errors import OptionError
from inlay.llm import LLM
from inlay.runtime.sampling_params import SamplingParams

LATENCIES = ("ttft", "tpot", "itl", "e2e")
SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "num_experts", "vocab_size")  # fmt: skip
"""Fields of a model's config that results repeat, where it has them."""

PRODUCT_ROWS = 512
"""Rows of the products whose rate bounds a prefill, at most: more are no faster."""


def add_arguments(parser: argparse.ArgumentParser, repeats: int, warmups: int) -> None:
    """Flags of all three; repeats and warmups are the defaults."""
    model.add_arguments(parser)
    datasets.add_arguments(parser.add_argument_group("workload"))
    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add("--repeats", "--num-iters", type=int, default=repeats, metavar="N",
        help=f"measured runs ({repeats}); the prefix cache is emptied before each")  # fmt: skip
    add("--num-warmups", "--num-iters-warmup", "--warmup", type=int, default=warmups, metavar="N",
        help=f"what is run before, unmeasured ({warmups})")  # fmt: skip
    add("--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="count requests within limits: ttft:200 tpot:50 e2el:5000")  # fmt: skip
    add("--output", "-o", metavar="FILE", help="append the result to this file, a line of JSON")
    add("--json", action="store_true", default=argparse.SUPPRESS, help="that line on stdout")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0)
    sampling.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="go on after the end of a sequence, so that output lengths are as asked (default)",
    )  # fmt: skip


@dataclass
class Session:
    """An engine that is warm, and what it is to run."""

    arguments: argparse.Namespace
    subject: model.Subject
    requests: list[datasets.Request]
    params: SamplingParams
    goodput: dict[str, float]
    opened: model.Opened | None = None
    bandwidth: float = 0.0

    @property
    def llm(self) -> LLM:
        assert self.opened is not None
        return self.opened.llm

    def begin_run(self) -> None:
        """Before each repeat: no prefix of the last one is left, and the memory is asked again."""
        self.llm.reset_prefix_cache()
        self.bandwidth = max(self.bandwidth, roofline.read_bandwidth(2))


def prepare(arguments: argparse.Namespace, workload: datasets.Workload) -> Session:
    """Check everything that can be checked, and make the requests, before anything is built."""
    for name in ("repeats", "num_warmups"):
        value, least = getattr(arguments, name), int(name == "repeats")
        if value < least:
            flag = name.replace("_", "-")
            raise OptionError(f"--{flag} must be at least {least}, got {value}")
    conditions.check_output(arguments.output)
    goodput = metrics.parse_goodput(arguments.goodput)
    params = SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        ignore_eos=arguments.ignore_eos,
    )
    subject = model.subject_of(arguments)
    limit, vocab_size = subject.max_seq_len, subject.vocab_size
    requests = datasets.make_requests(workload, vocab_size, limit, subject.tokenizer)
    return Session(arguments, subject, requests, params, goodput)


@contextmanager
def running(session: Session) -> Iterator[Session]:
    """Build, load and start the engine; at the end, or when interrupted, nothing of it is left."""
    torch.set_num_threads(model.num_threads(session.arguments))  # of the probes
    session.opened = model.open_model(session.subject, session.arguments)
    with session.opened.llm:
        yield session


def warm_up(session: Session, requests: Sequence[datasets.Request]) -> None:
    """Raises OptionError where not even these can be run."""
    if not requests:
        return
    failed = [r for r in run_offline(session.llm, requests, session.params) if not r.completed]
    if failed:
        raise OptionError(f"the warm-up failed, {failed[0].reason}: {failed[0].error}")


def facts_of(
    session: Session, bench: str, runs: Sequence[Sequence[metrics.Record]], watches: Sequence[Watch]
) -> dict[str, Any]:
    """Everything of a result but the roofline: conditions, rates, latencies, the cache."""
    arguments, opened = session.arguments, session.opened
    assert opened is not None
    manifest, config = opened.engine.manifest, opened.engine.model_config
    options, named = session.subject.options, conditions.without_directories
    given = vars(arguments) | {"dataset": Path(arguments.dataset).name}
    skip = {"command", "bench", "verbose", "json", "output", "model", "tokenizer", *model.COMPILE}
    skip |= set(model.EXECUTE)
    return {
        "bench": bench,
        "model": session.subject.label,
        "architecture": manifest["architecture"],
        "layers": len(opened.engine.artifact.program.attention_steps),
        "shapes": {n: config[n] for n in SHAPES if n in config},
        "dtype": manifest["dtype"],
        "backend": opened.engine.backend,
        "quantization": conditions.without_directories(
            manifest["options"].get("quantization", "none")
        ),
        "kv_cache_dtype": opened.kv_cache_dtype,
        "threads": model.num_threads(arguments),
        "build_s": opened.build_s,
        "options": {name: named(value) for name, value in options.items()},
        "arguments": {n: v for n, v in given.items() if n not in skip and _is_plain(v)},
        **metrics.summarize(runs, session.goodput),
        **_watched(watches),
        **conditions.conditions(),
    }


def cost_of(session: Session) -> ProgramCost:
    assert session.opened is not None
    return ProgramCost(session.opened.engine, session.opened.kv_cache_dtype)


def product_rate_of(session: Session, cost: ProgramCost, rows: int) -> float:
    return roofline.shape_rate(cost.products, max(min(rows, PRODUCT_ROWS), 2))


def finish(arguments: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Print the result and append it to the file; exit status 1 where a request failed."""
    facts = _rounded(facts)
    conditions.append(arguments.output, facts)
    if getattr(arguments, "json", False):
        print(json.dumps(facts))
    else:
        print("\n".join(table(facts)))
    if facts["num_failed"]:
        failed = "; ".join(f"{count} {what}" for what, count in facts["failures"].items())
        print(f"inlay bench: {facts['num_failed']} requests failed: {failed}", file=sys.stderr)
    return 1 if facts["num_failed"] else 0


def table(facts: Mapping[str, Any]) -> list[str]:
    """A result for a person, the formulas at its end."""
    lines = [
        f"{facts['bench']}: {facts['model']}, {facts['layers']} layers, {facts['dtype']}, "
        f"{facts['backend']}, {facts['threads']} threads on {facts['cpu']}",
        f"  requests     {facts['num_completed']} completed, {facts['num_failed']} failed, "
        f"{facts['num_input_tokens']} input and {facts['num_output_tokens']} output tokens",
        f"  throughput   {facts['requests_per_s']:.2f} requests/s, tokens/s: "
        f"input {facts['input_tokens_per_s']:.1f}, output {facts['output_tokens_per_s']:.1f}, "
        f"total {facts['total_tokens_per_s']:.1f}",
    ]
    if "api" in facts:
        lines.append(f"  API          {facts['api']}")
    if "goodput_per_s" in facts:
        lines.append(f"  goodput      {facts['goodput_per_s']:.2f} requests/s")
    lines.append("  ms                mean       p50       p90       p99")
    for name in (*LATENCIES, "wait", "batch"):
        row = facts.get(f"{name}_ms")
        if row is not None:
            cells = "".join(f"{row[key]:10.2f}" for key in ("mean", "p50", "p90", "p99"))
            shown = name.upper() if name in LATENCIES else name
            lines.append(f"  {shown:12}{cells}")
    if facts.get("itl_ms") is None:
        lines.append("  ITL          not measured: nothing was streamed, or nothing came in parts")
    if facts["kv_usage_peak"] is not None:
        lines.append(
            f"  KV cache     {facts['kv_usage_peak']:.1%} of the blocks at the peak, "
            f"{facts['kv_usage_mean']:.1%} on average of {facts['kv_usage_samples']} samples; "
            f"prefix hits {facts['prefix_hit_rate']:.1%}, {facts['num_preemptions']} preemptions"
        )
    shares = [f"{n.removesuffix('_share')} {v:.1%}" for n, v in facts["roofline"].items()
              if n.endswith("_share") and v is not None]  # fmt: skip
    lines.append(
        f"  roofline     {', '.join(shares)} of {facts['roofline']['read_gb_s']:.1f} GB/s and "
        f"{facts['roofline']['product_gflop_s']:.0f} GFLOP/s"
    )
    lines += [f"  {name} = {text}" for name, text in formulas(facts).items()]
    return lines


def formulas(facts: Mapping[str, Any]) -> dict[str, str]:
    """Those of the figures in a result."""
    shares = {name.replace("_", " ") for name in facts["roofline"]}
    told = {n: t for n, t in roofline.FORMULAS.items() if not n.endswith("share") or n in shares}
    skip = set() if "goodput_per_s" in facts else {"goodput"}
    return {n: t for n, t in (metrics.FORMULAS | told).items() if n not in skip}


def _watched(watches: Sequence[Watch]) -> dict[str, Any]:
    """Of all repeats: the highest peak, else means."""
    rows = [watch.facts() for watch in watches]
    known = [row for row in rows if row["kv_usage_peak"] is not None]
    hits = sum(row["prefix_hit_rate"] for row in rows) / len(rows)
    return {
        "num_steps": sum(row["num_steps"] for row in rows),
        "num_preemptions": sum(row["num_preemptions"] for row in rows),
        "kv_usage_peak": max((row["kv_usage_peak"] for row in known), default=None),
        "kv_usage_mean": sum(r["kv_usage_mean"] for r in known) / len(known) if known else None,
        "kv_usage_samples": sum(row["kv_usage_samples"] for row in rows),
        "prefix_hit_rate": hits,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)


def _rounded(value: Any) -> Any:
    """Floats to six digits, since what is beyond was not measured; infinity, which JSON lacks, as
    text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
