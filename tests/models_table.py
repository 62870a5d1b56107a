"""docs/models.md: what a test run saw of each architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.toys import ARCHITECTURES, ENCODERS, MULTIMODAL, REFUSED

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]
"""(name of the configuration, column) -> what was seen; columns: those of COLUMNS, bfloat16."""

COLUMNS = {"eager": "eager", "inductor": "inductor", "onnxruntime": "ONNX Runtime"}

HEAD = """# Architectures

Made by `pytest tests/test_architectures.py -m "slow or not slow" --models-table docs/models.md` \
with torch {torch} and transformers {transformers}; do not edit. Each row is a small configuration \
with random weights (tests/toys.py) that went through the whole pipeline in float32: ragged, \
chunked and mixed batches, prompts of 1 to 200 tokens, windows shorter than the prompts.

- **matches**: rewrites made of rewrites due, all passes; a miss fails the test.
- **error**: relative RMS error of the logits through the paged engine against Hugging Face.
- **tokens**: greedy tokens equal to Hugging Face's, teacher-forced.
- **bf16 RMS, KL**: error in bfloat16 against Hugging Face in float32, as a multiple of the error \
that Hugging Face's own bfloat16 makes; 1.25 is allowed. With experts, over \
the 90 % of rows that are least off: in the others a rounding chose another expert, there or here.

`inlay verify MODEL` gives the same answer for any other model.
"""


@contextmanager
def recording(rows: Rows, name: str, column: str) -> Iterator[Row]:
    """A row that is kept however the test ends."""
    row: Row = rows.setdefault((name, column), {})
    try:
        yield row
    except BaseException as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        raise


def write(rows: Rows, path: Path) -> None:
    order = [*ARCHITECTURES, *MULTIMODAL, *ENCODERS, *REFUSED]
    names = sorted({name for name, _ in rows}, key=order.index)
    by_name: dict[str, dict[str, Row]] = {name: {} for name in names}
    for (name, column), row in rows.items():
        by_name[name][column] = row
    refused = [name for name in names if "refused" in by_name[name].get("eager", {})]
    encoders = [n for n in names if n not in refused and not _tokens(by_name[n])]
    decoders = [n for n in names if n not in refused and n not in encoders]
    kinds = {row.get("model_type") for n in decoders for row in by_name[n].values()} - {None}
    text = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    text += f"\n## Decoders: {len(kinds)} model types, {len(decoders)} configurations\n\n"
    text += _table(decoders, by_name)
    text += f"\n## Encoders: {len(encoders)}, by hidden states\n\n" + _table(encoders, by_name)
    text += "\n## Refused, with the reason\n\n| configuration | reason |\n|---|---|\n"
    for name in refused:
        reason = by_name[name]["eager"]["refused"].partition("; without the registry")[0]
        short = re.sub(r'"[^"]*site-packages/', '"', reason).replace("|", "/")
        text += f"| {name} | {short} |\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _tokens(columns: dict[str, Row]) -> bool:
    return any("tokens" in row or "rms" in row for row in columns.values())


def _table(names: list[str], by_name: dict[str, dict[str, Row]]) -> str:
    titles = ["configuration", "matches"]
    titles += [title for name in COLUMNS.values() for title in (f"{name} error", "tokens")]
    lines = [f"| {' | '.join((*titles, 'bf16 RMS', 'KL'))} |", "|---" * (len(titles) + 2) + "|"]
    for name in names:
        cells = [name]
        for column in COLUMNS:
            row = by_name[name].get(column, {})
            if column == "eager":
                cells.append(_matches(row))
            if "failed" in row:
                cells += [f"failed: {row['failed'][:120]}", ""]
                continue
            cells.append(f"{row['error']:.1e}" if "error" in row else "")
            cells.append(f"{row['equal']} of {row['tokens']}" if "tokens" in row else "")
        narrow = by_name[name].get("bfloat16", {})
        cells += [f"{narrow[key]:.2f}" if key in narrow else "" for key in ("rms", "kl")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _matches(row: Row) -> str:
    due = [report for report in row.get("passes", ()) if report["expected"] is not None]
    return f"{sum(r['matches'] for r in due)} of {sum(r['expected'] for r in due)}" if due else ""
