"""A report for people."""

from __future__ import annotations

from collections.abc import Iterator

from inlay.verify.report import Report, max_ratio


def lines(report: Report) -> Iterator[str]:
    """The report, line by line."""
    yield f"{report.model}: {report.backend}, {report.dtype}, against Hugging Face in float32"
    yield from _measured(report)
    if report.layers:
        yield from _layers(report)
    for note in report.notes:
        yield f"note: {note}"
    for fault in report.faults:
        yield f"fault: {fault}"
    if report.finding is not None:
        found = report.finding
        yield f"first fault: {found.what}" + (
            "" if found.error is None else f" (relative error {found.error:.1e})"
        )
        for name in ("node", "module", "source"):
            if value := getattr(found, name):
                yield f"  {name}: {value}"
    yield "AGREES" if report.ok else "DISAGREES"


def _measured(report: Report) -> Iterator[str]:
    if report.measured is None:
        yield "nothing was run: the build was refused"
        return
    ours, theirs = report.measured.ours, report.measured.hugging_face
    lengths, tokens = report.prompt_lengths, report.measured.tokens
    yield (
        f"{report.num_tokens} tokens and logits rows of {len(lengths)} prompts, "
        f"{min(lengths)} to {max(lengths)} tokens long; chunked, mixed with decode"
    )
    heading = "" if theirs is None else f"{'HF ' + report.dtype:>14}{'ratio':>8}"
    yield f"{'':24}{'ours':>10}{heading}"
    for what, name, judged in (
        ("logits, relative RMS", "rms", True),
        ("KL divergence, mean", "kl_mean", True),
        ("KL divergence, max", "kl_max", False),
    ):
        row = f"{what:24}{getattr(ours, name):10.1e}"
        if theirs is not None:
            ratio = getattr(ours, name) / max(getattr(theirs, name), 1e-30)
            allowed = f"  (allowed {max_ratio(report.num_tokens)})" if judged else ""
            row += f"{getattr(theirs, name):14.1e}{ratio:8.2f}{allowed}"
        yield row
    yield (
        f"greedy tokens: {tokens.num_equal} of {tokens.num_tokens} equal, {tokens.num_excused} "
        f"excused by a near tie, {tokens.num_wrong} wrong"
    )


def _layers(report: Report) -> Iterator[str]:
    width = max(24, *(len(row.name) + 2 for row in report.layers))
    theirs = any(row.hugging_face is not None for row in report.layers)
    yield f"{'after layer':{width}}{'ours':>10}" + (f"{'HF ' + report.dtype:>14}" if theirs else "")
    for row in report.layers:
        other = "" if row.hugging_face is None else f"{row.hugging_face:14.1e}"
        yield f"{row.name:{width}}{row.ours:10.1e}{other}  ({row.seen_in})"
