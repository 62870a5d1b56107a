from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest

from inlay.backends.base import ModelLimits
from inlay.errors import ArtifactError, EngineError, RequestError
from inlay.runtime.admission import Admission
from inlay.runtime.messages import (
    KINDS,
    Abort,
    Add,
    Call,
    Failed,
    Init,
    Message,
    Outputs,
    Ready,
    Reply,
    Stop,
    WorkerError,
    decode,
    encode,
)
from inlay.runtime.outputs import Logprob, StepOutput
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling_params import SamplingParams

LIMITS = ModelLimits(
    vocab_size=7, max_seq_len=2**40, max_num_tokens=3, max_num_seqs=2, block_size=4
)
EVERY_PARAM = SamplingParams(
    temperature=0.1 + 0.2,
    top_p=5e-324,
    top_k=2**31 - 1,
    logit_bias={0: -1e6, 2**40: 0.5},
    allowed_token_ids=[3],
    bad_words=["naïve", "\N{PILE OF POO}"],
    bad_words_ids=[[1, 2], [3]],
    seed=2**64 - 1,
    stop=["", "x\0y", "\u2028"][1:],
    stop_token_ids=[2**63],
    max_tokens=None,
    logprobs=0,
    ignore_eos=True,
    n=2,
    best_of=64,
    logits_processors=["a.b:C", {"class": "d:E", "args": {"ü": [None, 1.5]}}],
    prompt_logprobs=20,
)
BEAMS = SamplingParams(
    n=2,
    use_beam_search=True,
    length_penalty=-0.5,
    early_stopping="never",
    skip_special_tokens=False,
)
EVERY_OPTION = RequestOptions(
    priority=-(2**31),
    timeout=1e-9,
    cache_salt="\N{SNOWMAN}",
    cache_priority=100,
    pooling="cls",
    normalize=False,
)
EVERY_OUTPUT = StepOutput(
    "réq\N{PILE OF POO}",
    token_ids=(0, 2**63),
    finish_reason="timeout",
    stop_reason=0,
    logprobs=({3: Logprob(-math.inf, 2**40, "\ufffd"), 0: Logprob(-0.0, 1)}, {}),
    index=19,
    cumulative_logprob=math.inf,
    prompt_logprobs=(None, {5: Logprob(-1e-308, 3)}),
    embedding=(math.inf, 1e-45, 0.1),
    num_cached_tokens=2**50,
    scheduled_time=1e9 + 1e-6,
)
MESSAGES: list[Message] = [
    Init("/a b/ü", "eager"),
    Init("", "", {"eos_token_ids": [], "debug": True, "max_seq_len": None}),
    Add(NewRequest("", [], SamplingParams())),
    Add(NewRequest("r", [0, 2**63], EVERY_PARAM, EVERY_OPTION, arrival_time=1e-300)),
    Add(NewRequest("b", [1], BEAMS)),
    Abort("r"),
    Abort("", 2**40),
    Call(0, "get_stats", []),
    Call(2**63, "pin_prefix", [[1, 2], None]),
    Stop(),
    Ready(Admission(LIMITS, (), (), is_encoder=True, in_process=False)),
    Ready(Admission(replace(LIMITS, padding_token=0), (0, 5), (2**62, 1))),
    Outputs([]),
    Outputs([StepOutput("r"), EVERY_OUTPUT]),
    Reply(0),
    Reply(2**63, {"a": [1, None, "x", 1.5, {}], "": -(2**63)}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_what_is_decoded_equals_what_was_encoded(message: Message) -> None:
    decoded = decode(encode(message))
    assert type(decoded) is type(message)
    assert decoded == message


def test_every_kind_and_every_field_is_tried() -> None:
    assert {type(message) for message in MESSAGES} | {Failed} == set(KINDS)
    for tried, plain in (
        (EVERY_OPTION, RequestOptions()),
        (EVERY_OUTPUT, StepOutput("")),
    ):
        same = {
            field.name
            for field in fields(tried)
            if getattr(tried, field.name) == getattr(plain, field.name)
        }
        assert not same - {"error"}
    untried = {
        field.name
        for field in fields(SamplingParams)
        if getattr(EVERY_PARAM, field.name) == getattr(SamplingParams(), field.name)
        and getattr(BEAMS, field.name) == getattr(SamplingParams(), field.name)
    }
    # Plain numbers and flags, as others that are tried.
    assert untried <= {
        "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "no_repeat_ngram_size", "min_tokens", "include_stop_str_in_output",
    }  # fmt: skip


def test_sequences_of_a_request_come_back_immutable() -> None:
    decoded: Any = decode(encode(Add(NewRequest("r", [1], EVERY_PARAM))))
    assert decoded.request.params.logit_bias == ((0, -1e6), (2**40, 0.5))
    assert hash(decoded.request.params) == hash(EVERY_PARAM)


def test_nan_is_still_nan() -> None:
    output = StepOutput("r", (1,), logprobs=({1: Logprob(math.nan, 1)},), embedding=(math.nan,))
    decoded: Any = decode(encode(Outputs([output])))
    assert math.isnan(decoded.outputs[0].logprobs[0][1].logprob)
    assert math.isnan(decoded.outputs[0].embedding[0])


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class StrangeError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "cls", "text"),
    [
        (ArtifactError("damaged: ü"), ArtifactError, "damaged: ü"),
        (RequestError(""), RequestError, ""),
        (KeyError("x"), EngineError, "KeyError: 'x'"),
        (MemoryError(), EngineError, "MemoryError"),
        (SystemExit(3), EngineError, "SystemExit: 3"),
        (RuntimeError("file \udcff"), EngineError, r"RuntimeError: file \udcff"),
        (StrangeError(), EngineError, "StrangeError: <exception str() failed>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_keep_class_and_text(error: BaseException, cls: type, text: str) -> None:
    error = raised(error)
    output = StepOutput("r", finish_reason="error", error=error)
    for message in (Failed(error), Reply(1, error=error), Outputs([output])):
        decoded: Any = decode(encode(message))
        back = decoded.outputs[0].error if isinstance(message, Outputs) else decoded.error
        assert type(back) is cls
        assert (
            str(back).replace("unprintable StrangeError object", "exception str() failed") == text
        )
        assert isinstance(back.__cause__, WorkerError)
        assert "in raised" in str(back.__cause__)


def a_function() -> None: ...


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (a_function, "a_function"),
        ({"deep": [a_function]}, "a_function"),
        (object(), "object"),
        (2**64, "64 bits"),
        ("\udcff", "surrogates"),
        (SamplingParams(logits_processors=[a_function]), "a_function"),
        (math, "module"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_cross_is_refused(value: Any, says: str) -> None:
    for message in (Call(1, "pin_prefix", [value]), Reply(1, value), Init("", "", {"x": value})):
        with pytest.raises(RequestError, match=r"in_process=True") as caught:
            encode(message)
        assert says in str(caught.value)


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RequestError, match="in_process=True"):
        encode(Call(1, "pin_prefix", endless))


def test_importing_needs_neither_msgspec_nor_torch() -> None:
    code = (
        "import sys; sys.modules['msgspec'] = None\n"
        "import inlay.runtime.messages\n"
        "assert 'torch' not in sys.modules\n"
        "import inlay.runtime.client\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
