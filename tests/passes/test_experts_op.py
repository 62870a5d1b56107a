"""The op's reference against transformers' own loops over experts, and what its fake promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay.passes.check import relative_rms
from inlay.passes.experts_op import ACTIVATIONS, activate
from inlay.passes.ops import REFERENCES
from tests.passes.experts import LAYOUTS, make_experts

# Float32 sums of 33 and 19 terms in two orders: a few times 2^-24 each.
FLOAT32 = 1e-6


def naive(case, gate_of) -> torch.Tensor:
    """One token and one expert at a time, in float64; gate_of makes I numbers of the up product."""
    x, index, weights, up, down, *_ = (
        t if t is None or not t.is_floating_point() else t.double() for t in case.tensors
    )
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if 0 <= expert < up.shape[0]:
                out[token] += weight * (down[expert] @ gate_of(up[expert] @ x[token]))
    return out


def test_formula() -> None:
    case = make_experts()
    expected = naive(case, lambda h: torch.nn.functional.silu(h[:19]) * h[19:])
    assert relative_rms(expected, case.reference()) < FLOAT32
    assert relative_rms(expected, case.swapped().reference()) > 0.1


def test_formula_of_a_clamped_gate_with_offset() -> None:
    case = make_experts(**LAYOUTS["clamped"])

    def gate_of(h: torch.Tensor) -> torch.Tensor:
        gate, up = h[:19].clamp(max=0.7), h[19:].clamp(-0.6, 0.6)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    assert relative_rms(naive(case, gate_of), case.reference()) < FLOAT32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_option_changes_the_result(layout: str) -> None:
    """None of them is read and then ignored."""
    options = LAYOUTS[layout]
    case = make_experts(**options)
    exact = case.in_float64()
    assert relative_rms(exact, case.reference()) < FLOAT32
    assert exact[2].eq(0).all()
    assert exact[[0, 1, 3]].ne(0).any(dim=1).all()
    neutral = {"up_offset": 0.0, "alpha": 1.0, "limit_activated": False, "activation": "silu"}
    for name, value in options.items():
        if isinstance(value, float) or name in ("limit_activated", "activation"):
            twin = replace(case, options={**case.options, name: neutral.get(name, 0.0)})
            assert relative_rms(exact, twin.in_float64()) > 1e-4, name
    vectors = ["up_bias", "down_bias"] if options.get("bias") else []
    for name in [*vectors, *(["norm_weight"] if "norm_eps" in options else [])]:
        assert relative_rms(exact, replace(case, **{name: None}).in_float64()) > 1e-2, name
    if options.get("gated", True):
        assert relative_rms(exact, case.swapped().in_float64()) > 1e-2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_their_formulas(activation: str) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    cubic = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    formulas = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": x * 0.5 * (1 + torch.tanh(cubic)),
        "relu": x * (x > 0),
        "relu2": x * x * (x > 0),
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "tanh": torch.tanh(x),
        "linear": x,
    }
    torch.testing.assert_close(activate(x, activation), formulas[activation])
    assert len(formulas) == len(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_no_more_than_a_loop_does(dtype: torch.dtype) -> None:
    """transformers' eager loop rounds each weighted output and each addition; the op does not."""
    case = make_experts(dtype, num_tokens=64)
    case.top_k_index[:3], case.top_k_weights[:3] = torch.tensor([0, 1, 2]), 0.3
    exact = case.in_float64()
    loop = torch.zeros_like(case.x)
    for expert in range(5):
        token, slot = torch.where(case.top_k_index == expert)
        gate, up = (case.x[token] @ case.up[expert].t()).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ case.down[expert].t()
        weight = case.top_k_weights.to(dtype)[token, slot, None]
        loop.index_add_(0, token, out * weight)
    assert 0 < relative_rms(exact, case.reference()) < relative_rms(exact, loop)


def test_a_token_does_not_depend_on_the_others() -> None:
    case = make_experts(num_tokens=6)
    together = case.reference()
    for token in range(6):
        row = slice(token, token + 1)
        alone = replace(
            case,
            x=case.x[row],
            top_k_index=case.top_k_index[row],
            top_k_weights=case.top_k_weights[row],
        ).reference()
        torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one(num_tokens: int) -> None:
    case = make_experts(num_tokens=num_tokens)
    assert case.reference().shape == (num_tokens, 33)
    assert relative_rms(case.in_float64(), case.reference()) < FLOAT32 or num_tokens == 0


def test_fake_has_the_shape_and_dtype_of_x() -> None:
    case = make_experts(torch.bfloat16, **LAYOUTS["interleaved"])
    with FakeTensorMode() as mode:
        faked = [t if t is None else mode.from_tensor(t) for t in case.tensors]
        out = torch.ops.inlay.experts(*faked, **case.options)
    real = torch.ops.inlay.experts(*case.tensors, **case.options)
    assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())
    assert REFERENCES[torch.ops.inlay.experts.default] is not None
