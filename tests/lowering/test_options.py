from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from inlay.cli.options import field_help
from inlay.errors import InlayError, OptionError
from inlay.lowering.options import CompileOptions, check_against_model


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("backend", "tensorflow", r"backend must be one of inductor, .*, got 'tensorflow'"),
        ("backend", None, r"onnxruntime, tensorrt, eager, got None"),
        ("backend", ["eager"], r"got \['eager'\]"),
        ("dtype", "int8", "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("dtype", torch.float64, "float16, got 'float64'"),
        ("dtype", 32, "got 32"),
        ("block_size", 17, "block_size must be one of 16, 32, 64, 128, got 17"),
        ("block_size", 16.0, "got 16.0"),
        ("block_size", "16", "got '16'"),
        ("optimization_level", 4, "optimization_level must be one of 0, 1, 2, 3, got 4"),
        ("optimization_level", True, "got True"),
        ("verify", "all", "verify must be one of capture, engine, pass, got 'all'"),
        ("max_seq_len", 1, "max_seq_len must be an integer of at least 2, got 1"),
        ("max_seq_len", "64", "got '64'"),
        ("max_num_tokens", 1, "max_num_tokens must be an integer of at least 2, got 1"),
        ("max_num_tokens", 64.0, "got 64.0"),
        ("max_num_tokens", None, "got None"),
        ("max_num_seqs", 0, "max_num_seqs must be an integer of at least 1, got 0"),
        ("max_num_seqs", True, "got True"),
        ("max_num_seqs", 4096, r"max_num_tokens must be at least max_num_seqs \(4096\).*got 2048"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        CompileOptions(**{option: value})
    assert isinstance(caught.value, InlayError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(OptionError, match="unknown option 'blocksize'; options are backend"):
        CompileOptions.from_kwargs({"blocksize": 16})
    assert CompileOptions.from_kwargs({"block_size": 64}).block_size == 64


def test_a_torch_dtype_is_a_dtype() -> None:
    assert CompileOptions(dtype=torch.bfloat16) == CompileOptions(dtype="bfloat16")  # type: ignore[arg-type]


def test_options_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CompileOptions().block_size = 64  # type: ignore[misc]


def test_every_option_is_documented() -> None:
    assert list(field_help(CompileOptions)) == [field.name for field in fields(CompileOptions)]


def test_max_seq_len_is_the_models_unless_less_is_asked_for() -> None:
    assert check_against_model(CompileOptions(), 256) == 256
    assert check_against_model(CompileOptions(max_seq_len=100), 256) == 100
    assert check_against_model(CompileOptions(max_seq_len=256), 256) == 256
    with pytest.raises(OptionError, match=r"max_seq_len must be at most .*\(256\), got 257"):
        check_against_model(CompileOptions(max_seq_len=257), 256)
    # Without a limit of the model's any length is possible.
    assert check_against_model(CompileOptions(max_seq_len=10**6), None) == 10**6
    assert check_against_model(CompileOptions(), None) == 4096
