"""The report as one self-contained HTML page: no script, nothing fetched, printable.

The template escapes whatever comes from the model; only our own pictures go in as they are, and
they were built as trees, which escape as well.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from inlay.report.cost import DECODE_CONTEXT, Machine
from inlay.report.facts import Report
from inlay.report.layer import KINDS, Layer
from inlay.report.picture import describe, draw_layer, draw_roofline

FOLDER = Path(__file__).parent


def render(report: Report, machine: Machine | None, measured: bool) -> str:
    """machine: for the roofline, None to leave it out. measured: whether on this machine."""
    return _template().render(
        report=report,
        machine=machine,
        measured=measured,
        kinds=KINDS,
        style=Markup((FOLDER / "style.css").read_text()),
        roofline=_roofline(report, machine),
        pictures=[_picture(layer, name) for layer, name in _layers(report)],
        context=min(DECODE_CONTEXT, report.limits["max_seq_len"]),
    )


def _layers(report: Report) -> list[tuple[Layer, str]]:
    named = ((report.before, "before"), (report.after, "after"))
    return [(layer, name) for layer, name in named if layer is not None]


def _picture(layer: Layer, name: str) -> dict[str, Any]:
    return {
        "layer": layer,
        "name": name,
        "svg": Markup(draw_layer(layer, name)),
        "words": [(node.name, describe(node)) for node in layer.nodes],
    }


def _roofline(report: Report, machine: Machine | None) -> Markup | None:
    if machine is None or not report.costs:
        return None
    return Markup(draw_roofline(report.costs, machine, "roofline"))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quantity": quantity, "numbers": numbers, "verdict": verdict}
    return environment.get_template("page.html.j2")


def quantity(value: float, unit: str) -> str:
    """12,300,000 bytes as "12.3 MB"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def numbers(values: tuple[int, ...]) -> str:
    """(0, 1, 2, 4) as "0-2, 4"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def verdict(report: Report) -> str:
    """The report in a sentence."""
    misses = sum(len(one.misses) for one in report.passes)
    checked = [one.error for one in report.passes if one.error is not None]
    sentence = f"{len(report.passes)} passes ran"
    sentence += f", {misses} expected rewrites are missing" if misses else ", none missed a rewrite"
    if checked:
        sentence += f"; the largest error after a pass is {max(checked):.1e}"
    return sentence + "."
