"""The page: well-formed, self-contained, harmless, and with the numbers of the reports."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from inlay.passes.pass_manager import PASSES
from inlay.report.cost import Machine
from inlay.report.facts import Failure, PassFacts, Report
from inlay.report.layer import KINDS, Layer, LayerNode, kind_of
from inlay.report.page import FOLDER, numbers, quantity, render
from inlay.report.picture import draw_layer, draw_roofline

MACHINE = Machine(bandwidth=25e9, flops=200e9)
VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</code></svg><script>alert('x')</script><img src=x onerror=alert(1)> &amp; \"'"


class Page(HTMLParser):
    """Collects elements and text, and fails where tags do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def page_of(report: Report, machine: Machine | None = MACHINE) -> Page:
    return Page(render(report, machine, True))


def test_numbers_of_the_reports_are_on_the_page(llama: Report) -> None:
    text = page_of(llama).text
    assert f"{len(PASSES)} passes ran, none missed a rewrite" in text
    for one in llama.passes:
        due = "any" if one.expected is None else one.expected
        error = "0" if one.error == 0 else f"{one.error:.1e}"
        nodes = f"{one.num_nodes_before} {one.num_nodes_after}"
        row = f"{one.name} {one.matches} {due} 0 {error} {nodes} {one.seconds * 1000:.1f}"
        assert row in text
    norms = next(one for one in llama.passes if one.name == "fuse_rms_norm").changed_ops
    assert ("inlay.rms_norm", 0, 5) in norms
    for op, before, after in norms:
        assert f"{op}{before}{after}" in text
    for cost in llama.costs:
        assert quantity(cost.product_flops, "FLOP") in text
        assert f"{cost.tokens_per_second(MACHINE):,.0f}" in text
    for segment in llama.segments:
        assert segment.key in text
    assert "0-1 all before 4 2 16 / 16 0 0.25 none" in text
    assert f"{llama.errors['capture']:.2e}" in text


def test_the_page_is_self_contained_and_small(llama: Report) -> None:
    html = render(llama, MACHINE, True)
    assert len(html.encode()) < 300_000
    assert not re.search(r"https?:|//|@import|url\((?!#)", html)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "action")]
        assert tag != "a" or str(attrs["href"]).startswith("#")
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert all(str(attrs["href"])[1:] in targets for attrs in page.named("a"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_who_cannot_see_it_is_told(llama: Report) -> None:
    page = page_of(llama)
    assert page.named("html")[0]["lang"] == "en"
    assert len(page.named("svg")) == 3
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= ids
    for header in page.named("th"):
        assert header["scope"] in ("row", "col")
    assert llama.after is not None
    for node in llama.after.nodes:
        assert f"{node.name}: {node.op}" in page.text


def test_a_box_for_each_op_of_the_layer(llama: Report) -> None:
    assert llama.before is not None
    assert llama.after is not None
    assert llama.before.title == "model.layers.1, as captured"
    ops = [node.op for node in llama.before.nodes]
    assert ops.count("linear") == 7
    assert ops.count("rsqrt") == 2
    assert ops.count("inlay.attention") == 1
    fused = [node.op for node in llama.after.nodes if node.op.startswith("inlay.")]
    assert sorted(fused) == [
        "inlay.add_rms_norm", "inlay.add_rms_norm", "inlay.gated", "inlay.linear", "inlay.linear",
        "inlay.linear", "inlay.linear", "inlay.paged_attention", "inlay.rope", "inlay.rope",
    ]  # fmt: skip
    assert llama.after.num_ops < llama.before.num_ops
    for layer in (llama.before, llama.after):
        svg = ElementTree.fromstring(draw_layer(layer, "x"))
        boxes = [g for g in svg.iter("g") if g.get("class", "").startswith("node ")]
        assert len(boxes) == len(layer.nodes)
        assert sum(g.get("class") != "node edge" for g in boxes) == layer.num_ops
        for node, box in zip(layer.nodes, boxes, strict=True):
            texts = [text.text for text in box.iter("text")]
            assert texts[0] == node.op
            assert not node.shape or texts[1] == node.shape
        assert len(list(svg.iter("path"))) - 1 == sum(len(set(n.inputs)) for n in layer.nodes)
        assert "s0" not in "".join(node.shape for node in layer.nodes)
    product = next(node for node in llama.after.nodes if node.kind == "product")
    assert product.shape == "[1, T, 128]"
    assert product.reads[0].endswith("q_proj+k_proj+v_proj.weight [128, 64]")


def test_hostile_names_are_text(llama: Report) -> None:
    layer = Layer(HOSTILE, (LayerNode(HOSTILE, HOSTILE, "product", HOSTILE, (HOSTILE,), ()),))
    hostile = PassFacts(HOSTILE, 1, 2, 0.1, 3, 4, (HOSTILE,), 0.0, {HOSTILE: 1}, {HOSTILE: 2})
    report = replace(
        llama,
        name=HOSTILE,
        architecture=HOSTILE,
        limits={**llama.limits, HOSTILE: HOSTILE},
        options={HOSTILE: HOSTILE},
        passes=(hostile,),
        failure=Failure(HOSTILE, HOSTILE, HOSTILE),
        before=layer,
        after=layer,
    )
    page = page_of(report)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [n for _, attrs in page.elements for n in attrs if n.startswith("on")]
    assert page.text.count(HOSTILE) >= 12
    with pytest.raises(AssertionError):  # the parser sees what is not escaped
        Page(f"<p>{HOSTILE}</p>")


def test_misses_and_failures_stand_out(llama: Report) -> None:
    missed = replace(llama.passes[-1], misses=("model.norm: eps is not a constant",))
    text = page_of(replace(llama, passes=(llama.passes[0], missed))).text
    assert "1 expected rewrites are missing" in text
    assert "model.norm: eps is not a constant" in text
    failure = Failure("pass fuse_rope", "VerificationError", "error 0.3, allowed 1e-4")
    broken = replace(
        llama, failure=failure, skipped=("fuse_rope", "fuse_gemms"), segments=(), attentions=(),
        costs=(), ops=None, before=None, after=None,
    )  # fmt: skip
    page = page_of(broken, None)
    assert "Failed: pass fuse_rope" in page.text
    assert "error 0.3, allowed 1e-4" in page.text
    assert "Not finished or not run: fuse_rope, fuse_gemms." in page.text
    assert "There is no finished program to count." in page.text
    assert "none missed a rewrite" not in page.text
    assert not page.named("svg")


def test_text_can_be_read_on_every_colour() -> None:
    """WCAG 2 asks for a contrast of 4.5."""
    style = (FOLDER / "style.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    for theme in (light, dark):
        assert set(KINDS) <= set(theme)
        for back in (*KINDS, "back", "panel"):
            assert contrast(theme["text"], theme[back]) >= 4.5, back
        for front in ("soft", "link", "good", "warn"):
            assert contrast(theme[front], theme["back"]) >= 4.5, front
        assert contrast(theme["soft"], theme["panel"]) >= 4.5
        assert contrast(theme["bad"], theme["bad-back"]) >= 4.5
    assert contrast("#777", "#888") < 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_labels_of_the_roofline_keep_apart(llama: Report) -> None:
    near = [replace(cost, product_flops=cost.num_bytes, attention_flops=0) for cost in llama.costs]
    svg = ElementTree.fromstring(draw_roofline(near, MACHINE, "x"))
    names = {cost.workload.name for cost in near}
    heights = sorted(float(t.get("y", "")) for t in svg.iter("text") if t.text in names)
    assert len(heights) == 3
    assert all(upper + 14 <= lower for upper, lower in pairwise(heights))


def test_words() -> None:
    assert [quantity(n, "B") for n in (7, 1234, 999_960, 13_640_832, 2.5e12)] == [
        "7 B", "1.23 kB", "1 MB", "13.6 MB", "2.5 TB",
    ]  # fmt: skip
    assert numbers((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    names = ("linear", "inlay.experts", "inlay.paged_attention", "add_rms_norm", "silu", "add", "t")
    kinds = ["product", "product", "attention", "norm", "activation", "pointwise", "shape"]
    assert [kind_of(name) for name in names] == kinds
