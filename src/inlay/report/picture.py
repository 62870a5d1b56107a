"""Draw a layer, and the roofline, as SVG. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement, tostring

from inlay.report.cost import Machine, StepCost
from inlay.report.layer import KINDS, Layer, LayerNode
from inlay.report.layout import lay_out

LINE = 15.0
PADDING = 7.0
ROW_GAP = 26.0
CHARACTER = 7.0
"""Width of a character of the monospaced 11.5 px font, with something to spare."""
LONGEST = 36
"""Characters of a line in a box; what is longer is cut, and whole in the tooltip and the list."""


def draw_layer(layer: Layer, name: str) -> str:
    """One box for each op, inputs above users. name: unique on the page."""
    lines = {node.name: _lines(node) for node in layer.nodes}
    widths = {
        key: max(len(line) for line in text) * CHARACTER + 2 * PADDING
        for key, text in lines.items()
    }
    plan = lay_out({node.name: node.inputs for node in layer.nodes}, widths)
    heights = [0.0] * plan.rows
    for key, text in lines.items():
        heights[plan.row[key]] = max(heights[plan.row[key]], len(text) * LINE + 2 * PADDING)
    tops = [PADDING + sum(heights[:i]) + i * ROW_GAP for i in range(plan.rows)]
    width = plan.width + 2 * PADDING
    height = (tops[-1] + heights[-1] if tops else 0.0) + PADDING
    summary = f"{layer.num_ops} ops, drawn from inputs at the top to outputs at the bottom"
    svg = _svg(width, height, name, layer.title, f"{summary}; the list below says the same.")
    marker = SubElement(
        SubElement(svg, "defs"),
        "marker",
        {"id": f"{name}-arrow", "viewBox": "0 0 8 8", "refX": "7", "refY": "4", "orient": "auto",
         "markerWidth": "7", "markerHeight": "7"},
    )  # fmt: skip
    SubElement(marker, "path", {"d": "M0 0L8 4L0 8z", "class": "arrow"})
    for (source, _), xs in plan.paths.items():
        begin = tops[plan.row[source]] + len(lines[source]) * LINE + 2 * PADDING
        path = _path([x + PADDING for x in xs], begin, plan.row[source], tops, heights)
        SubElement(svg, "path", {"class": "wire", "d": path, "marker-end": f"url(#{name}-arrow)"})
    for node in layer.nodes:
        centre = plan.centre[node.name] + PADDING
        _box(svg, node, lines[node.name], centre, widths[node.name], tops[plan.row[node.name]])
    return tostring(svg, encoding="unicode")


def _lines(node: LayerNode) -> list[str]:
    reads = [read for read in node.reads if "weight" in read or "bias" in read] or list(node.reads)
    lines = [node.op, node.shape, *(_short(read) for read in reads[:2])]
    return [_cut(line, LONGEST) for line in lines if line]


def _short(weight: str) -> str:
    """Its last two names: the layer's number and the rest are the picture's title."""
    name, bracket, shape = weight.partition(" [")
    return _cut(".".join(name.split(".")[-2:]), LONGEST - len(bracket + shape)) + bracket + shape


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: max(longest, 2) - 1]}…"


def _path(
    xs: Sequence[float], begin: float, row: int, tops: Sequence[float], heights: Sequence[float]
) -> str:
    """Straight down through a row, curved between rows."""
    parts = [f"M{xs[0]:.1f} {begin:.1f}"]
    for before, after in pairwise(xs):
        upper, lower = tops[row] + heights[row], tops[row + 1]
        middle = (upper + lower) / 2
        curve = f"{before:.1f} {middle:.1f} {after:.1f} {middle:.1f} {after:.1f} {lower:.1f}"
        parts.append(f"V{upper:.1f}C{curve}")
        row += 1
    return "".join(parts)


def _box(
    svg: Element, node: LayerNode, lines: list[str], centre: float, width: float, top: float
) -> None:
    group = SubElement(svg, "g", {"class": f"node {node.kind}"})
    SubElement(group, "title").text = describe(node)
    shape = {"x": f"{centre - width / 2:.1f}", "y": f"{top:.1f}", "width": f"{width:.1f}"}
    shape |= {"height": f"{len(lines) * LINE + 2 * PADDING:.1f}", "rx": "5"}
    SubElement(group, "rect", shape)
    for number, line in enumerate(lines):
        baseline = top + PADDING + (number + 0.78) * LINE
        place = {"x": f"{centre:.1f}", "y": f"{baseline:.1f}"}
        SubElement(group, "text", {**place, "class": "op" if number == 0 else "detail"}).text = line


def describe(node: LayerNode) -> str:
    """A node in words, for tooltips and for who cannot see the picture."""
    parts = [f"{node.op} → {node.shape}" if node.shape else node.op, KINDS[node.kind]]
    if node.reads:
        parts.append(f"reads {', '.join(node.reads)}")
    if node.inputs:
        parts.append(f"takes {', '.join(node.inputs)}")
    return "; ".join(parts)


def draw_roofline(costs: Sequence[StepCost], machine: Machine, name: str) -> str:
    """Speed against intensity, both logarithmic: the roof, and each workload under it."""
    width, height, left, bottom, top = 620.0, 300.0, 64.0, 252.0, 22.0
    places = [math.log10(cost.intensity) for cost in costs] + [math.log10(machine.ridge)]
    first, last = math.floor(min(places)), math.ceil(max(places) + 0.3)
    peak = math.log10(machine.flops)
    floor = math.floor(first + math.log10(machine.bandwidth))

    def x(intensity: float) -> float:
        return left + (math.log10(intensity) - first) / (last - first) * (width - left - 20)

    def y(flops: float) -> float:
        return bottom - (math.log10(flops) - floor) / (peak + 0.25 - floor) * (bottom - top)

    summary = f"The roof rises with intensity up to {machine.ridge:.3g} operations per byte."
    svg = _svg(width, height, name, "Roofline", f"{summary} The table says the same.")
    for power in range(first, last + 1):
        at = f"{x(10.0**power):.1f}"
        SubElement(svg, "path", {"class": "grid", "d": f"M{at} {top:.1f}V{bottom:.1f}"})
        _text(svg, float(at), bottom + 16, f"{10.0**power:g}", "axis middle")
    for power in range(floor, math.floor(peak) + 1):
        at = f"{y(10.0**power):.1f}"
        SubElement(svg, "path", {"class": "grid", "d": f"M{left} {at}H{width - 20}"})
        _text(svg, left - 6, float(at) + 4, f"{10.0 ** (power - 9):g}", "axis end")
    _text(svg, (left + width) / 2, height - 12, "operations per byte", "axis middle")
    _text(svg, 4, 14, "GFLOP/s", "axis")
    start = (10.0**first, 10.0**first * machine.bandwidth)
    ridge, end = (machine.ridge, machine.flops), (10.0**last, machine.flops)
    roof = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in (start, ridge, end))
    SubElement(svg, "path", {"class": "roof", "d": f"M{roof}"})
    taken: list[float] = []
    for cost in costs:
        reach = min(machine.flops, cost.intensity * machine.bandwidth)
        place = {"cx": f"{x(cost.intensity):.1f}", "cy": f"{y(reach):.1f}", "r": "5"}
        SubElement(svg, "circle", {**place, "class": "point"})
        below = y(reach) + 20
        while any(abs(below - other) < 14 for other in taken):
            below += 15
        taken.append(below)
        side = "end" if x(cost.intensity) > width * 0.6 else ""
        _text(svg, x(cost.intensity) + (-8 if side else 8), below, cost.workload.name, side)
    return tostring(svg, encoding="unicode")


def _text(svg: Element, x: float, y: float, text: str, classes: str) -> None:
    SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": classes}).text = text


def _svg(width: float, height: float, name: str, title: str, description: str) -> Element:
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    labels = {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    svg = Element("svg", {"viewBox": f"0 0 {width:.0f} {height:.0f}", **size, **labels})
    SubElement(svg, "title", {"id": f"{name}-title"}).text = title
    SubElement(svg, "desc", {"id": f"{name}-desc"}).text = description
    return svg
