from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from inlay.backends.static_call import StaticCall


def add(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0] + inputs[1].sum()


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_copied_to_fixed_addresses(device: str) -> None:
    call = StaticCall(add, [torch.zeros(3, device=device), torch.zeros(2, 2, device=device)])
    addresses = [tensor.data_ptr() for tensor in call.inputs]
    given = [torch.arange(3.0, device=device), torch.ones(2, 2, device=device)]
    assert call(given).tolist() == [4, 5, 6]
    given[0] += 1
    assert call(given).tolist() == [5, 6, 7]
    assert [tensor.data_ptr() for tensor in call.inputs] == addresses


@pytest.mark.parametrize("device", DEVICES)
def test_smaller_inputs_leave_the_rest_as_it_was(device: str) -> None:
    call = StaticCall(add, [torch.zeros(3, device=device), torch.zeros(2, 2, device=device)])
    call([torch.full((3,), 7.0, device=device), torch.ones(2, 2, device=device)])
    result = call([torch.zeros(2, device=device), torch.zeros(2, 1, device=device)])
    assert result.tolist() == [2, 2, 9]


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_unlike_types(device: str) -> None:
    """They are copied by type; none is left out, and none lands in another's place."""
    shapes = [(torch.int64, 3), (torch.int32, 3), (torch.float32, 3), (torch.int64, 3)]
    given = [torch.full((n,), i + 1, dtype=d, device=device) for i, (d, n) in enumerate(shapes)]
    call = StaticCall(
        lambda inputs: [one.clone() for one in inputs], list(map(torch.zeros_like, given))
    )
    for found, wanted in zip(call(given), given, strict=True):
        assert torch.equal(found, wanted)


def test_inputs_that_do_not_fit_are_our_own_fault() -> None:
    call = StaticCall(add, [torch.zeros(3), torch.zeros(2, 2)])
    with pytest.raises(RuntimeError):
        call([torch.zeros(4), torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="shorter"):
        call([torch.zeros(3)])
