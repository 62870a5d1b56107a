"""The C++ experts against the op's reference in float64, and through a compiled segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.backends.graph_json import graph_from_json
from inlay.backends.inductor.compile import Packing, _Segment, compile_segment, packed_weights
from inlay.backends.inductor.native import load_package
from inlay.backends.kernels import cpu_ops
from inlay.errors import BuildError
from inlay.passes.check import relative_rms
from inlay.passes.experts_op import ACTIVATIONS
from tests.passes.experts import LAYOUTS, Experts, make_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The op rounds to its dtype four times (both products, activation, result), each time by a relative
# error of at most half a unit in the last place, 2^-9 in bfloat16, and by 0.3 of it in the mean.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Iterator[None]:
    cpu_ops.load_ops()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(case: Experts) -> torch.Tensor:
    options = dict(case.options)
    interleaved, transposed = options.pop("interleaved"), options.pop("transposed", False)
    bias = case.up_bias
    if bias is not None and interleaved:
        bias = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
    return torch.ops.inlay_cpu.experts(
        case.x,
        case.top_k_index,
        case.top_k_weights,
        torch.ops.inlay_cpu.pack_experts(case.up, transposed, interleaved),
        torch.ops.inlay_cpu.pack_experts(case.down, transposed),
        bias,
        case.down_bias,
        case.norm_weight,
        **options,
    )


def check(case: Experts) -> None:
    exact, out = case.in_float64(), run(case)
    assert out.dtype is case.x.dtype
    assert relative_rms(exact, out) < TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    case = make_experts(dtype, **LAYOUTS[layout])
    check(case)
    exact = case.in_float64()
    if case.options.get("gated", True):
        assert relative_rms(exact, run(case.swapped())) > 10 * TOLERANCE[dtype]
    if case.up_bias is not None:
        for name in ("up_bias", "down_bias"):
            assert relative_rms(exact, run(replace(case, **{name: None}))) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, isa: str) -> None:
    try:
        torch.ops.inlay_cpu.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        check(make_experts(activation=activation))
        check(make_experts(torch.bfloat16, activation=activation, gated=False, bias=True))
        check(make_experts(torch.float16, num_tokens=20, activation=activation))
    finally:
        torch.ops.inlay_cpu.set_isa("auto")


@pytest.mark.parametrize("dtype", DTYPES)
# Rows of one expert: none, 1 (never alone in oneDNN), 4 and 5 (small_matmul's step), 16 and 17
# (its end), more than one octave of padding.
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 5, 16, 17, 150])
def test_numbers_of_rows(num_tokens: int, dtype: torch.dtype) -> None:
    """Sizes that small_matmul takes (multiples of 32, even), where it exists."""
    for top_k in (1, 3):
        case = make_experts(dtype, num_tokens, num_experts=6, hidden=64, inner=96, top_k=top_k)
        check(case) if num_tokens else run(case)
    if num_tokens > 3:
        case.top_k_index[:] = torch.tensor([1, 0, 2])  # everything to the same experts
        case.top_k_weights[:] = 0.5
        check(case)


def test_only_the_routed_experts_are_read() -> None:
    """The last two experts get no token: whatever their weights hold must not show."""
    case = make_experts()
    expected = run(case)
    for weight in (case.up, case.down):
        weight[-2:] = float("nan")
    torch.testing.assert_close(run(case), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    case = make_experts(dtype, num_tokens=70, num_experts=6, hidden=64, inner=96)
    expected = run(case)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        torch.testing.assert_close(run(case), expected, rtol=0, atol=0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("differs", ["nothing", "x", "top_k_index", "top_k_weights"])
def test_tokens_that_repeat_the_one_before_them(differs: str) -> None:
    case = make_experts(num_tokens=6)
    for given in (case.x, case.top_k_index, case.top_k_weights):
        given[3:] = given[3]
    if differs != "nothing":
        getattr(case, differs)[5] = getattr(case, differs)[0]
    check(case)


def test_padding_beside_them_does_not_change_tokens() -> None:
    case = make_experts(num_tokens=8)
    case.top_k_index[4:] = -1
    padded = run(case)
    alone = replace(
        case, x=case.x[:4], top_k_index=case.top_k_index[:4], top_k_weights=case.top_k_weights[:4]
    )
    assert padded[4:].eq(0).all()
    torch.testing.assert_close(padded[:4], run(alone), rtol=0, atol=0)


def test_strides_and_weights_of_another_dtype() -> None:
    case = make_experts(torch.bfloat16)
    wide = torch.randn(case.x.shape[0], 70).bfloat16()
    strided = replace(case, x=wide[:, 3:36], top_k_weights=case.top_k_weights.double())
    assert not strided.x.is_contiguous()
    check(strided)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 32)}, "do not fit"),
        ({"x": torch.zeros(9, 33).double()}, "weights' dtype"),
        ({"top_k_index": torch.zeros(8, 3, dtype=torch.long)}, "top_k_index"),
        ({"top_k_index": torch.zeros(9, 3, dtype=torch.int32)}, "int64"),
        ({"down_bias": torch.zeros(7, 32)}, "down_bias"),
        ({"norm_weight": torch.zeros(33).half()}, "norm_weight"),
        ({"options": {"interleaved": False, "activation": "swish"}}, "'swish'"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(replace(make_experts(), **change))


def test_a_copied_handle_is_refused() -> None:
    case = make_experts()
    packed = [torch.ops.inlay_cpu.pack_experts(w) for w in (case.up, case.down)]
    arguments = case.x, case.top_k_index, case.top_k_weights
    with pytest.raises(RuntimeError, match="the very tensor"):
        torch.ops.inlay_cpu.experts(*arguments, packed[0].clone(), packed[1], None, None, None)
    linear = torch.ops.inlay_cpu.pack_linear(case.up[0])
    with pytest.raises(RuntimeError, match="the very tensor"):
        torch.ops.inlay_cpu.experts(*arguments, packed[0], linear, None, None, None)


# --- in a compiled segment -------------------------------------------------------------------


def segment(case: Experts, also_read: bool = False) -> dict[str, Any]:
    """x + experts(x) as a segment's graph; also_read: something else reads the up weight, too."""
    weights = [case.up, case.down, case.up_bias, case.down_bias]
    inputs = {"top_k_weights": case.top_k_weights, "top_k_index": case.top_k_index, "x": case.x}
    nodes: list[dict[str, Any]] = [
        {"op": "weight", "shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")}
        for w in weights
        if w is not None
    ]
    up, down, up_bias, down_bias, scores, index, x = ({"node": number} for number in range(7))
    for value in inputs.values():
        dtype = str(value.dtype).removeprefix("torch.")
        nodes.append({"op": "input", "shape": ["T", value.shape[1]], "dtype": dtype})
    arguments = [x, index, scores, up, down, up_bias, down_bias]
    nodes += [
        {"op": "inlay.experts.default", "args": arguments, "kwargs": case.options},
        {"op": "aten.add.Tensor", "args": [x, {"node": 7}], "kwargs": {}},
        {"op": "aten.neg.default", "args": [up if also_read else x], "kwargs": {}},
        {"op": "output", "args": [{"node": 8}, {"node": 9}]},
    ]
    return {"nodes": nodes}


def test_a_compiled_segment(tmp_path: Path) -> None:
    """Interleaved and biased: the bias must be put in order like the weight."""
    case = make_experts(num_tokens=11, **LAYOUTS["interleaved"])
    graph = segment(case)
    packed = packed_weights(graph_from_json(graph))
    assert packed == {
        0: Packing("experts", transposed=True, interleaved=True),
        1: Packing("experts", transposed=True),
        2: Packing("halves"),
    }
    compile_segment(graph, tmp_path / "segment.pt2", 0)
    weights = [case.up, case.down, case.up_bias, case.down_bias]
    resident = [packed[i](w) if i in packed else w for i, w in enumerate(weights)]
    inputs = [case.top_k_weights, case.top_k_index, case.x]
    out, negative = load_package(tmp_path / "segment.pt2")([*resident, *inputs])
    expected = case.x + case.reference()
    assert relative_rms(expected, out) < TOLERANCE[torch.float32]
    assert negative.equal(-case.x)
    wrong = [*resident[:2], case.up_bias, case.down_bias]
    out, _ = load_package(tmp_path / "segment.pt2")([*wrong, *inputs])
    assert relative_rms(expected, out) > 1e-2


def test_experts_that_cannot_be_packed_are_refused() -> None:
    graph = graph_from_json(segment(make_experts(**LAYOUTS["biased"]), also_read=True))
    assert packed_weights(graph) == {1: Packing("experts")}
    with pytest.raises(BuildError, match="experts' up"):
        _Segment(graph)
