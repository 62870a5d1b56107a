"""The cache's formats: names, and what writing and reading a value loses at most."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import OptionError
from inlay.passes.kv_formats import (
    KV_CACHE_DTYPES,
    dequantize,
    has_token_scales,
    kv_dtype,
    make_scales,
    parse_kv_cache_dtype,
    quantize,
    vector_nbytes,
)

# Half a unit in the last place, relative to the value, where it is a normal number.
HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "fp8": 2.0**-4}


def there_and_back(x: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """x [..., D] as it is read again."""
    layer = torch.tensor([scale]) if dtype == torch.float8_e4m3fn else None
    values, scales = quantize(x, dtype, layer)
    assert values.dtype == dtype
    return dequantize(values, layer if scales is None else scales).to(x.dtype)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *((name, name) for name in ("auto", "float32", "bfloat16", "float16", "fp8", "int8")),
        ("fp32", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp8_e4m3", "fp8"),
    ],
)
def test_words_that_users_know(word: str, name: str) -> None:
    assert parse_kv_cache_dtype(word) == name
    model = torch.bfloat16
    assert kv_dtype(word, model) == (model if name == "auto" else KV_CACHE_DTYPES[name])


def test_without_a_word_the_models_dtype() -> None:
    assert kv_dtype(None, torch.float16) == torch.float16


@pytest.mark.parametrize("word", ["fp8_e5m2", "int4", "INT8", "", 8, None, ["fp8"]])
def test_other_words_are_refused(word: object) -> None:
    with pytest.raises(OptionError, match=r"kv_cache_dtype must be one of auto, .*int8.* given "):
        parse_kv_cache_dtype(word)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_the_formats_rounding(name: str, model: torch.dtype) -> None:
    dtype = KV_CACHE_DTYPES[name]
    # Sizes from 1e-3 to 1e2, one vector of zeros; odd shapes.
    sizes = 10 ** torch.linspace(-3, 2, 35).view(5, 7, 1)
    x = (torch.randn(5, 7, 33) * sizes).to(model)
    x[2, 3] = 0
    read = there_and_back(x, dtype).double()
    if name == "int8":
        # Half a step of the vector's own scale, and float32's rounding of scale and quotient.
        bound = x.double().abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 * 2**-22)
    else:
        # Below the smallest normal number the step is constant: 2^-9 in e4m3, 2^-24 in float16.
        least = {"fp8": 2.0**-10, "float16": 2.0**-25}.get(name, 0.0)
        bound = (x.double().abs() * HALF_ULP[name]).clamp(min=least)
    # And what is read may be rounded to the model's dtype.
    bound = bound + (x.double().abs() * torch.finfo(model).eps).clamp(min=2.0**-25)
    error = (read - x.double()).abs()
    assert (error <= bound).all()
    if name in ("fp8", "int8"):
        assert error.max() > bound.max() / 4  # the bound is not a loose one
    assert (read[2, 3] == 0).all()


def test_values_that_a_format_has_come_back_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    assert torch.equal(there_and_back(every, torch.float8_e4m3fn), every)
    for scale in (0.25, 3.0):
        exact = every * scale
        assert torch.equal(there_and_back(exact, torch.float8_e4m3fn, scale), exact)
    steps = torch.arange(-127, 128).float()
    for step in (1.0, 2.0**-20, 2.0**30):
        assert torch.equal(there_and_back(steps * step, torch.int8), steps * step)


@pytest.mark.parametrize("name", ["fp8", "float16", "bfloat16"])
def test_what_is_too_large_saturates(name: str) -> None:
    dtype = KV_CACHE_DTYPES[name]
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, 3.4e38, -3.4e38, float("inf"), -float("inf")])
    signs = torch.tensor([1.0, 1, -1, 1, -1])
    assert torch.equal(there_and_back(x, dtype), largest * signs)
    # bfloat16's neighbour of 65504 is 65536, which float16 does not have.
    wide = torch.tensor([70000.0, -70000.0]).bfloat16()
    assert there_and_back(wide, dtype).isfinite().all()


def test_a_scale_of_fp8_moves_its_range() -> None:
    x = torch.tensor([1000.0, 5000.0])
    assert there_and_back(x, torch.float8_e4m3fn, 4.0).tolist() == [1024.0, 448 * 4.0]


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    x = torch.randn(3, 5)
    x[1, 2] = float("nan")
    read = there_and_back(x, KV_CACHE_DTYPES[name])
    assert read[1, 2].isnan()
    assert read[[0, 2]].isfinite().all()


def test_a_vectors_scale_depends_on_it_alone() -> None:
    x = torch.randn(6, 3, 10)
    values, scales = quantize(x, torch.int8, None)
    assert scales is not None
    assert scales.shape == (6, 3)
    for token in range(6):
        alone, its = quantize(x[token : token + 1], torch.int8, None)
        assert torch.equal(alone, values[token : token + 1])
        assert torch.equal(its, scales[token : token + 1])
    assert (values.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_bytes_are_what_the_tensors_take(name: str) -> None:
    dtype = KV_CACHE_DTYPES[name]
    scales = make_scales(dtype, 3, 2, 16)
    values = torch.empty(3, 2, 16, 24, dtype=dtype)
    by_token = scales.nbytes if scales is not None and has_token_scales(dtype) else 0
    assert 3 * 2 * 16 * vector_nbytes(dtype, 24) == values.nbytes + by_token
    assert (scales is None) == (name not in ("fp8", "int8"))
