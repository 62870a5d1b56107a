"""A comparison as SVG: bars for each workload and precision, with the conditions below."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from inlay.bench.peers.summary import START

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 860, 190, 130
BAR, GAP, TITLE = 18, 6, 34
CAPTION = 140
"""Characters of a line below."""

OURS_COLOUR, PEER_COLOUR, WRONG_COLOUR = "#b5420f", "#7d8ca3", "#d5d5d5"


def draw(results: Sequence[Mapping[str, Any]], conditions: Sequence[str]) -> str:
    """The picture's text. results: of `summary.result_of`, one for each precision."""
    svg = Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=str(WIDTH),
        role="img",
        attrib={"font-family": "sans-serif", "font-size": "13"},
    )
    SubElement(svg, "title").text = "Inlay beside its peers"
    background = SubElement(svg, "rect", width=str(WIDTH), fill="#ffffff")
    y = 14
    for name in _figure_names(results):
        for result in results:
            bars = _bars(result, name)
            if bars:
                y = _panel(svg, y, f"{result['precision']}: {_title(result, name)}", bars)
    for line in conditions:
        y += 17
        _text(svg, 14, y, line, fill="#555555", attrib={"font-size": "11"})
    y += 14
    svg.set("height", str(y))
    svg.set("viewBox", f"0 0 {WIDTH} {y}")
    background.set("height", str(y))
    indent(svg)
    return tostring(svg, encoding="unicode") + "\n"


def _figure_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for result in results:
        for system in result["systems"].values():
            names |= dict.fromkeys(system["figures"])
    return list(names)


def _title(result: Mapping[str, Any], name: str) -> str:
    if name in START:
        return START[name] + ", lower is better"
    return str(result["titles"][name])


def _bars(result: Mapping[str, Any], name: str) -> list[tuple[str, float, str]]:
    """(label, figure, colour), best first; what does not count is grey and last."""
    bars = []
    for label, system in result["systems"].items():
        if name in system["figures"] and not system["error"]:
            ours = label.startswith("inlay")
            colour = OURS_COLOUR if ours else PEER_COLOUR
            text = label if system["counts"] else f"{label} (wrong tokens)"
            bars.append(
                (text, system["figures"][name], colour if system["counts"] else WRONG_COLOUR)
            )
    sign = 1 if name in START else -1
    return sorted(bars, key=lambda bar: (bar[2] == WRONG_COLOUR, sign * bar[1]))


def _panel(svg: Element, y: int, title: str, bars: Sequence[tuple[str, float, str]]) -> int:
    """Draw one group from y on; returns where it ends."""
    _text(svg, 14, y + 16, title, attrib={"font-weight": "bold"})
    y += TITLE - 6
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    most = max(figure for _, figure, _ in bars)
    for label, figure, colour in bars:
        length = max(1, round(room * figure / most))
        anchor = {"text-anchor": "end"}
        _text(svg, LABEL_WIDTH - 8, y + BAR - 5, label, attrib=anchor)
        SubElement(
            svg,
            "rect",
            x=str(LABEL_WIDTH),
            y=str(y),
            width=str(length),
            height=str(BAR),
            fill=colour,
        )
        _text(svg, LABEL_WIDTH + length + 6, y + BAR - 5, f"{figure:.4g}")
        y += BAR + GAP
    return y + 10


def _text(svg: Element, x: int, y: int, text: str, fill: str = "#1c1c1c", **more: Any) -> None:
    SubElement(svg, "text", x=str(x), y=str(y), fill=fill, **more).text = text


def captions(line: dict[str, Any]) -> list[str]:
    """Lines below the picture."""
    versions: dict[str, str] = {}
    for result in line["results"]:
        for system in result["systems"].values():
            versions |= system.get("versions", {})
    speeds = [speed for result in line["results"] for speed in result["read_gb_s"]]
    memory = f", memory read at {min(speeds)}-{max(speeds)} GB/s" if speeds else ""
    return [
        f"{line['model']}, {line['cpu']}, {line['threads']} threads{memory}",
        f"Medians of {line['repeats']} interleaved repeats; outputs checked with Hugging Face in "
        "float32.",
        *textwrap.wrap(", ".join(f"{n} {v}" for n, v in sorted(versions.items())), CAPTION),
    ]
