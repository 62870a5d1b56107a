"""What can be asked for, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest

from inlay.errors import OptionError
from inlay.passes.quantize.config import QuantizationConfig, Scheme, parse_quantization


def parsed(value: Any) -> QuantizationConfig:
    config = parse_quantization(value)
    assert config is not None
    return config


@pytest.mark.parametrize("value", [None, "none"])
def test_none_asks_for_nothing(value: Any) -> None:
    assert parse_quantization(value) is None


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w8a8", Scheme("int8", "int8")),
        ("int8", Scheme("int8", "int8")),
        ("w8a8,activation_symmetric=false", Scheme("int8", "int8", activation_symmetric=False)),
        ("w8a16", Scheme("int8")),
        ("w8a16,group_size=64,symmetric=False", Scheme("int8", group_size=64, symmetric=False)),
        ("int4", Scheme("int4", group_size=32)),
        ("w4a16,group_size=0", Scheme("int4")),
        ("fp8", Scheme("fp8", "fp8")),
        ("fp8,weight_scales=tensor", Scheme("fp8", "fp8", per_tensor=True)),
        (
            "fp8,activation_scales=static,calibration=t.txt",
            Scheme("fp8", "fp8", static=True),
        ),
    ],
)
def test_a_string_gives_the_layers_scheme_and_back(text: str, scheme: Scheme) -> None:
    config = parsed(text)
    assert config.layers == scheme
    assert parsed(str(config)) == config
    assert parsed(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("w8a8", Scheme("int8", "int8")),
        ("w8a8,activation_scales=static,calibration=x", Scheme("int8")),
        ("w4a16", Scheme("int8")),
        ("fp8", None),
        ("w8a8,lm_head=none", None),
        ("w8a8,lm_head=w4a16", Scheme("int4", group_size=32)),
    ],
)
def test_the_lm_head_has_a_format_of_its_own(text: str, head: Scheme | None) -> None:
    assert parsed(text).head == head


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("int5", "format must be one of w8a8"),
        (7, "quantization must be one of"),
        ("w8a8,groupsize=3", "unknown 'groupsize'; known are format"),
        ("w8a8,group_size", "'group_size' must be name=value"),
        ("w4a16,group_size=48", "group_size must be one of None, 0, 32, 64, 128, got 48"),
        ("w4a16,group_size=x", "group_size must be a number, got 'x'"),
        ("w8a8,group_size=32", "format 'w8a8' has no group_size=32"),
        ("w8a8,symmetric=false", "format 'w8a8' has no symmetric=False"),
        ("w8a16,activation_scales=static", "has no activation_scales='static'"),
        ("fp8,activation_symmetric=false", "has no activation_symmetric=False"),
        ("w8a8,weight_scales=tensor", "has no weight_scales='tensor'"),
        ("w8a8,method=gptq", "method 'gptq' is for w4a16, w8a16, got format 'w8a8'"),
        ("w4a16,method=gptq", "needs texts: give calibration=FILE"),
        ("w8a8,activation_scales=static", "needs texts"),
        ("w8a8,smoothing=2", "smoothing must be from 0 to 1, got 2.0"),
        ("w8a8,num_samples=0", "num_samples must be an integer >= 1, got 0"),
        ({"format": "w8a8", "symmetric": 1}, "symmetric must be one of True, False, got 1"),
        ({"group_size": 64}, "format is missing; it is one of w8a8"),
        ({"format": ["w8a8"]}, "format must be one of w8a8, w8a16, w4a16, fp8, got ['w8a8']"),
        ("w8a8,smoothing=0.1,smoothing=0.2", "smoothing is there twice"),
        ("w8a16,format=w4a16", "format is there twice"),
        ({"format": "w8a8", "smoothing": True}, "smoothing must be from 0 to 1, got True"),
        ("w8a8,ignore=re:.*(q_proj|k_proj)", "'re:.*(q_proj' is no regular expression (missing )"),
        ({"format": "w8a8", "ignore": ["re:(a|b)"]}, "holds | or a comma, which end a pattern"),
        ({"format": "w8a8", "ignore": ["re:a{1,2}"]}, "give each alternative as a pattern of its"),
        (
            {"format": "w4a16", "method": "gptq", "calibration": "a,b.jsonl"},
            "calibration must be a file whose name has no comma",
        ),
        ({"format": "w8a8", "ignore": 5}, "ignore must be a list of patterns of names, got 5"),
        ({"format": "w8a8", "ignore": [5]}, "ignore must be a list of patterns of names, got (5,)"),
        (
            {"format": "w8a8", "calibration": 5},
            "calibration must be a file, or an iterable of texts, got 5",
        ),
    ],
)
def test_what_cannot_be_is_refused(value: Any, words: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_quantization(value)
    assert words in str(error.value)


def test_layers_are_ignored_by_name_pattern_or_regular_expression() -> None:
    config = parsed("w8a8,ignore=down_proj|model.layers.0.*|re:.*\\.7\\.mlp")
    ignored = ["model.layers.3.mlp.down_proj", "model.layers.0.self_attn.q_proj", "a.7.mlp.up_proj"]
    for name in ignored:
        assert config.ignores([f"{name}.weight"])
    assert not config.ignores(["model.layers.10.mlp.up_proj.weight"])
    assert config.ignores(["model.layers.3.mlp.up_proj.weight", "x.mlp.down_proj.weight"])
