"""How much of what the machine allows our systems use: of the memory in decode, of the products'
rate in prefill. Peers do not say what they read and compute."""

from __future__ import annotations

import statistics
from typing import Any

from inlay.bench.peers.measure import Record, Session
from inlay.bench.peers.summary import short
from inlay.bench.peers.workloads import DECODE_PROMPT, DECODE_TOKENS, PREFILL_PROMPT
from inlay.bench.program_cost import ProgramCost
from inlay.bench.roofline import decode_share, prefill_share, shape_rate
from inlay.engine import Engine


def shares_of(session: Session) -> dict[str, dict[str, float]]:
    """By system: decode_share, with each repeat's own read probe, the median; prefill_share, of
    the rate of torch's or oneDNN's products of the model's shapes (roofline.py), measured now."""
    return {
        record.system.name: _of_one(session, record)
        for record in session.each()
        if record.system.is_ours
    }


def _of_one(session: Session, record: Record) -> dict[str, float]:
    engine = Engine.load(session.place.place(record.system) / "engine")
    cost, shares = ProgramCost(engine), {}
    if rates := record.figures.get("decode"):
        contexts = [DECODE_PROMPT + DECODE_TOKENS // 2]
        shares["decode_share"] = statistics.median(
            decode_share(cost, contexts, 1 / rate, bandwidth)
            for rate, bandwidth in zip(rates, session.bandwidth, strict=True)
        )
    if rates := record.figures.get("prefill"):
        seconds = PREFILL_PROMPT / statistics.median(rates)
        limit = shape_rate(cost.products, PREFILL_PROMPT)
        shares["prefill_share"] = prefill_share(cost, [PREFILL_PROMPT], seconds, limit)
        shares["product_gflop_s"] = limit / 1e9
    return {name: short(value) for name, value in shares.items()}


def lines_of(result: dict[str, Any]) -> list[str]:
    """The same in words."""
    lines = []
    for name, system in result["systems"].items():
        shares = system.get("shares") or {}
        words = []
        if "decode_share" in shares:
            words.append(f"decode reads at {shares['decode_share']:.0%} of the memory's speed")
        if "prefill_share" in shares:
            words.append(
                f"prefill computes at {shares['prefill_share']:.0%} of "
                f"{shares['product_gflop_s']:.0f} GFLOP/s"
            )
        if words:
            lines.append(f"{name}: {', '.join(words)}")
    return lines
