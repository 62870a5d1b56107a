from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inlay.passes.check import Check, relative_rms
from inlay.passes.fuse_rope import fuse_rope
from inlay.passes.graph import calls
from inlay.passes.ops import rope
from inlay.passes.pass_manager import PASSES, run_passes
from tests.passes.architectures import NAMES, graph_and_tensors
from tests.passes.graphs import DTYPES, ROUNDING, export, refusals, rewrite

aten = torch.ops.aten
ROPE = torch.ops.inlay.rope.default

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_chunks(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def repeated(table: torch.Tensor) -> torch.Tensor:
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def standard(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return sin * rotate_chunks(x) + cos * x


def backwards(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def subtracted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos - rotate_half(x) * sin


def chunks(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    (a, b), c, s = x.split(half, dim=-1), cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * repeated(cos) + rotate_pairs(x) * repeated(sin)


def selected_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    both, c, s = x.reshape(*x.shape[:-1], half, 2), cos[..., :half], sin[..., :half]
    a, b = both[..., 0], both[..., 1]
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)


def pairs_to_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    a, b, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


HALF = [standard, swapped, backwards, subtracted, chunks, pairs_to_halves]
INTERLEAVED = [pairs, selected_pairs]


class Rope(torch.nn.Module):
    """x [1, T, H, D] as queries are before their transposition; cos, sin from integer positions."""

    def __init__(self, apply: Form, rotated: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        self.apply_rope = apply
        self.rotated = rotated
        self.scale = scale
        self.register_buffer("inv_freq", 1 / 10 ** torch.linspace(0, 3, rotated // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None, :, None].float()
        freqs = positions * self.inv_freq
        emb = self.embed(freqs)
        cos = (emb.cos() * self.scale).to(x.dtype).unsqueeze(1)
        sin = (emb.sin() * self.scale).to(x.dtype).unsqueeze(1)
        x = x.transpose(1, 2)
        part, rest = x[..., : self.rotated], x[..., self.rotated :]
        return torch.cat([self.apply_rope(part, cos, sin), rest], dim=-1)

    def embed(self, freqs: torch.Tensor) -> torch.Tensor:
        return torch.cat((freqs, freqs), dim=-1)


@DTYPES
@pytest.mark.parametrize("form", [*HALF, *INTERLEAVED])
@pytest.mark.parametrize("size", [6, 11], ids=["whole", "partial"])
def test_forms(form: Form, size: int, dtype: torch.dtype) -> None:
    gm, tensors = export(Rope(form, scale=1.25), torch.randn(1, 5, 3, size, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_rope)
    assert (count, error) == (1, 0)
    (node,) = calls(gm, ROPE)
    x, cos, sin, interleaved = node.args
    assert interleaved == (form in INTERLEAVED)
    assert [arg.meta["val"].shape[-1] for arg in (x, cos, sin)] == [6, 3, 3]
    assert node.meta["val"].dtype == dtype
    assert not calls(gm, aten.sub.Tensor, aten.stack.default)
    assert len(calls(gm, aten.neg.default)) == (form in (backwards, subtracted))
    # Those of the angles, of the rest of the head and, for pairs that become halves, of x.
    assert len(calls(gm, aten.cat.default)) == 1 + (size > 6) + (form is pairs_to_halves)


@DTYPES
def test_tables_may_be_wider_than_x(dtype: torch.dtype) -> None:
    """Models that rotate in float32 cast around the rotation: so does the graph."""

    def wide(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return standard(x.float(), cos.float(), sin.float()).to(x.dtype)

    gm, tensors = export(Rope(wide), torch.randn(1, 5, 3, 6, dtype=dtype))
    assert rewrite(gm, tensors, fuse_rope) == (1, 0)
    (node,) = calls(gm, ROPE)
    assert node.meta["val"].dtype == torch.float32


class Complex(torch.nn.Module):
    """Pairs as complex numbers, always in float32."""

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        self.radius = radius
        self.register_buffer("inv_freq", 1 / 10 ** torch.linspace(0, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[None, :, None].float() * self.inv_freq
        turn = torch.polar(torch.full_like(angles, self.radius), angles) * 1.25
        if self.radius == 1.0:
            turn = torch.polar(torch.ones_like(angles), angles) * 1.25
        numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * turn[:, :, None, :]).flatten(3).type_as(x)


@DTYPES
def test_complex_form(dtype: torch.dtype) -> None:
    gm, tensors = export(Complex(), torch.randn(1, 5, 3, 6, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_rope)
    # Complex products may be fused multiply-adds, and cosines come from another function.
    assert count == 1
    assert error < ROUNDING[dtype]
    (node,) = calls(gm, ROPE)
    assert node.args[3]
    assert node.meta["val"].dtype == torch.float32
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "call_function"]
    assert not any(v.is_complex() for v in values if isinstance(v, torch.Tensor))


def test_complex_numbers_of_another_radius_are_left() -> None:
    gm, tensors = export(Complex(radius=2.0), torch.randn(1, 5, 3, 6))
    assert rewrite(gm, tensors, fuse_rope) == (0, 0)
    assert "not polar(ones, angles)" in refusals(gm)


def test_one_table_serves_all() -> None:
    class Two(Rope):
        def apply_both(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return standard(x, cos, sin) - backwards(x + 1, cos, sin)

        def __init__(self) -> None:
            super().__init__(self.apply_both)

    gm, tensors = export(Two(), torch.randn(1, 5, 3, 6))
    assert rewrite(gm, tensors, fuse_rope) == (2, 0)
    first, second = calls(gm, ROPE)
    assert first.args[1] is second.args[1]
    assert second.args[2].args[0] is first.args[2]
    assert len(calls(gm, aten.cos.default)) == len(calls(gm, aten.sin.default)) == 1


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_reference_rotates_by_the_angle(interleaved: bool) -> None:
    x, angles = torch.randn(2, 7, 10, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    out = rope(x, angles.cos(), angles.sin(), interleaved)
    shape = (5, 2) if interleaved else (2, 5)
    dim = -1 if interleaved else -2
    a, b = x.unflatten(-1, shape).unbind(dim)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.stack((turned.real, turned.imag), dim=dim).flatten(-2)
    assert relative_rms(expected, out) < 1e-15  # float64: a few roundings of 2^-53


def uneven(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin


def unswapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., :3], x[..., 3:]), dim=-1) * sin


def other_tensor(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x.sin() * cos + rotate_half(x) * sin


def two_tensors(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x.sin()[..., 3:], x[..., :3]), dim=-1) * sin


def pairs_with_tables_of_halves(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return x * cos + rotate_pairs(x) * sin


def halves_with_tables_of_pairs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return x * repeated(cos) + rotate_half(x) * repeated(sin)


def crossed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2)
    return x * repeated(cos) + turned * repeated(sin)


def same_signs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., 3:], -x[..., :3]), dim=-1) * sin


def hyperbolic(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (a, b), c, s = x.chunk(2, dim=-1), cos[..., :3], sin[..., :3]
    return torch.cat((a * c + b * s, b * c + a * s), dim=-1)


def swapped_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (a, b), c, s = x.chunk(2, dim=-1), cos[..., :3], sin[..., :3]
    return torch.cat((a * c - b * s, b * s + a * c), dim=-1)


def scaled_sum(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.add(x * cos, rotate_half(x) * sin, alpha=2)


def broadcast(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x[:, :1]
    return x * cos.expand(-1, 3, -1, -1) + rotate_half(x) * sin


OTHER_TENSOR = "the rotation is not of the halves or pairs of the tensor that is scaled"
UNEQUAL = "for one pair are not known to be equal"


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (uneven, OTHER_TENSOR),
        (unswapped, OTHER_TENSOR),
        (other_tensor, OTHER_TENSOR),
        (two_tensors, OTHER_TENSOR),
        (pairs_with_tables_of_halves, UNEQUAL),
        (halves_with_tables_of_pairs, UNEQUAL),
        (crossed, OTHER_TENSOR),
        (same_signs, "the signs are not those of a rotation"),
        (hyperbolic, "the signs are not those of a rotation"),
        (swapped_tables, UNEQUAL),
        (scaled_sum, OTHER_TENSOR),
        (broadcast, "broadcasts"),
    ],
)
def test_look_alikes(form: Form, reason: str) -> None:
    gm, tensors = export(Rope(form), torch.randn(1, 5, 3, 6))
    count, error = rewrite(gm, tensors, fuse_rope)
    assert (count, error) == (0, 0)
    assert reason in refusals(gm)


def test_unequal_halves_of_cos_are_refused() -> None:
    class Unequal(Rope):
        def embed(self, freqs: torch.Tensor) -> torch.Tensor:
            return torch.cat((freqs, 2 * freqs), dim=-1)

    gm, tensors = export(Unequal(standard), torch.randn(1, 5, 3, 6))
    count, error = rewrite(gm, tensors, fuse_rope)
    assert (count, error) == (0, 0)
    assert UNEQUAL in refusals(gm)


UP_TO_ROPE = PASSES[: [one.name for one in PASSES].index("fuse_rope") + 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    """As many as the captured modules say, none missed, and each table computed once."""
    gm, tensors = graph_and_tensors(name)
    report = run_passes(gm, UP_TO_ROPE, Check(tensors.__getitem__, ROUNDING[torch.float32]))[-1]
    assert (report.matches, report.misses) == (report.expected, ())
    found = calls(gm, ROPE)
    assert len(found) == report.matches
    for node in found:
        x, cos, sin = (arg.meta["val"] for arg in node.args[:3])
        assert cos.shape == sin.shape
        assert cos.shape[-1] * 2 == x.shape[-1]
        assert node.meta["val"].shape == x.shape
    assert not any(calls(gm, aten.polar.default, aten.view_as_complex.default))
    cosines = {node.args[0] for node in calls(gm, aten.cos.default)}
    assert len(cosines) == len(calls(gm, aten.cos.default)) == len(calls(gm, aten.sin.default))
    # Angles by layer type at most: one more for those that see a window.
    assert len(cosines) <= 2


NUMBERS = {
    "llama4_text": 2,  # the second layer has none, but a temperature by position
    "cohere2": 2,  # layers without a window have none
    "falcon-alibi": 0,
    "gpt2": 0,
    "gptj": 6,  # no cosine in the graph: rows of a table
    "diffllama": 4,  # two calls of attention with the same queries and keys
    "gemma3n_text": 6,  # two of four layers take the keys of others
    "deepseek_v2": 4,  # a part of the queries, and a key for all heads
}


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_expected_numbers(name: str, number: int) -> None:
    """Counted by hand in the models' code: what is expected and what is found may err alike."""
    gm, _ = graph_and_tensors(name)
    assert len(run_passes(gm, UP_TO_ROPE)[-1].misses) == 0
    assert len(calls(gm, ROPE)) == number


def test_a_broken_rotation_is_a_miss_with_its_reason() -> None:
    gm, _ = graph_and_tensors("llama")
    halves = next(n for n in calls(gm, aten.cat.default) if aten.neg.default in _targets(n.args[0]))
    halves.args = (list(reversed(halves.args[0])), *halves.args[1:])
    report = run_passes(gm, UP_TO_ROPE)[-1]
    assert (report.matches, report.expected) == (3, 4)
    assert report.misses == (f"model.layers.0.self_attn: {OTHER_TENSOR}",)


def _targets(nodes: list[torch.fx.Node]) -> list[object]:
    return [node.target for node in nodes]
