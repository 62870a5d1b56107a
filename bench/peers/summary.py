"""What a comparison came to: medians, ratios of ours to each peer, a table, a JSON line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from inlay.bench.peers.measure import Record, Session
from inlay.bench.peers.workloads import Workload

START = {"cold_start": "cold start, s", "warm_start": "warm start, s"}
"""Figures that are better when they are lower: seconds to the first token."""


SCORES = ("top1", "near", "deficit")


def figures_of(record: Record) -> dict[str, float]:
    """Medians, by workload; cold_start with the preparation, since there is no start without."""
    figures = {name: statistics.median(values) for name, values in record.figures.items()}
    if record.cold_start_s is not None and record.prepare_s is not None:
        figures["cold_start"] = record.prepare_s + record.cold_start_s
    if record.warm_start_s:
        figures["warm_start"] = statistics.median(record.warm_start_s)
    return figures


def ratios_of(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """ours -> peer -> workload -> our figure over the peer's; for starts below 1 is better.

    Only systems whose figures count are compared.
    """
    counting = [record for record in records if record.counts]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for ours in (record for record in counting if record.system.is_ours):
        own = figures_of(ours)
        others = [record for record in counting if record is not ours]
        result[ours.system.name] = {
            other.system.name: {
                name: own[name] / value for name, value in figures_of(other).items() if name in own
            }
            for other in others
        }
    return result


def result_of(session: Session, shares: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """One precision as JSON. shares: of `shares_of`."""
    systems = {}
    for record in session.records:
        systems[record.system.name] = {
            **record.facts,
            "figures": {name: short(value) for name, value in figures_of(record).items()},
            "repeats": {n: [short(v) for v in values] for n, values in record.figures.items()},
            "prepare_s": record.prepare_s and short(record.prepare_s),
            "shares": shares.get(record.system.name),
            "score": record.score and {n: round(v, 4) for n, v in asdict(record.score).items()},
            "counts": record.counts,
            "error": record.error,
        }
    return {
        "precision": session.records[0].system.precision,
        "read_gb_s": [round(value / 1e9, 1) for value in session.bandwidth],
        "systems": systems,
        "ratios": {
            ours: {peer: {n: round(v, 3) for n, v in row.items()} for peer, row in peers.items()}
            for ours, peers in ratios_of(session.records).items()
        },
    }


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def table_of(result: Mapping[str, Any], workloads: Sequence[Workload]) -> str:
    """Two Markdown tables: figures of all systems, and the ratios."""
    titles = {workload.name: f"{workload.name}, {workload.unit}" for workload in workloads} | START
    systems = result["systems"]
    names = [name for name in titles if any(name in s["figures"] for s in systems.values())]
    head = [result["precision"], *(titles[name] for name in names), "peak MB", *SCORES]
    rows = []
    for name, system in systems.items():
        if system["error"]:
            rows.append([name, f"failed: {system['error'][:120]}", *[""] * (len(head) - 2)])
            continue
        score = system["score"] or {}
        label = name if system["counts"] else f"{name} (wrong tokens: does not count)"
        values = [f"{system['figures'].get(n, float('nan')):.4g}" for n in names]
        shares = [f"{score[n]:.3f}" if n in score else "" for n in SCORES]
        rows.append([label, *values, f"{system.get('peak_rss_mb', float('nan')):.0f}", *shares])
    text = _markdown(head, rows)
    ratios = [
        [f"{ours} / {peer}", *(f"{row[n]:.2f}" if n in row else "" for n in names)]
        for ours, peers in result["ratios"].items()
        for peer, row in peers.items()
    ]
    if ratios:
        text += "\n" + _markdown(["ratio", *names], ratios)
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
