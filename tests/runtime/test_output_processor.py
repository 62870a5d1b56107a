from __future__ import annotations

import pytest

from inlay.errors import RequestError
from inlay.runtime.output_processor import OutputProcessor, OutputState
from inlay.runtime.outputs import FinishReason, StepOutput
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.toy_tokenizers import byte_level

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> list[int]:
    """One token for each ASCII character."""
    return TOKENIZER.convert_tokens_to_ids([c.replace(" ", "Ġ") for c in text])


def follow(
    text: str,
    params: SamplingParams,
    end: FinishReason | None = "length",
    end_id: int | None = None,
) -> tuple[OutputState, list[str], int]:
    """Feed a text a token at a time: the state, the deltas, and how many tokens were taken."""
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, ids_of("x"), params)
    ids = ids_of(text) + ([] if end_id is None else [end_id])
    deltas = []
    for number, token in enumerate(ids, 1):
        reason = end if number == len(ids) else None
        changed = processor.process([StepOutput("r", (token,), reason)])
        assert changed == [state]
        deltas.append(state.snapshot().outputs[0].delta)
        if state.finished:
            assert processor.process([StepOutput("r", (token,))]) == []
            return state, deltas, number
    return state, deltas, len(ids)


def test_text_and_metrics() -> None:
    state, deltas, _ = follow("hello", SamplingParams())
    output = state.snapshot()
    (completion,) = output.outputs
    assert (completion.text, completion.token_ids) == ("hello", ids_of("hello"))
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert deltas == list("hello")
    assert completion.delta == ""
    assert output.finished
    metrics = output.metrics
    assert metrics.ttft is not None
    assert metrics.e2e_latency is not None
    assert 0 < metrics.ttft < metrics.e2e_latency


def test_metrics_before_the_first_token() -> None:
    state = OutputProcessor(None).add("r", "text", [1], SamplingParams())
    metrics = state.snapshot().metrics
    assert (metrics.ttft, metrics.e2e_latency) == (None, None)


def test_a_stop_string_ends_the_request_and_is_never_shown() -> None:
    params = SamplingParams(stop=[" and", "zzz"])
    state, deltas, taken = follow("you an' me and them", params)
    assert deltas == ["y", "o", "u", "", "", "", " an'", "", " m", "e", "", "", "", ""]
    output = state.snapshot().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("you an' me", "stop", " and")
    assert output.token_ids == ids_of("you an' me and")
    assert taken == len("you an' me and")


def test_a_stop_string_may_be_kept() -> None:
    params = SamplingParams(stop="me", include_stop_str_in_output=True)
    state, deltas, _ = follow("you and me and them", params)
    assert state.snapshot().outputs[0].text == "".join(deltas) == "you and me"


def test_what_was_held_back_comes_at_the_end() -> None:
    state, deltas, _ = follow("one an", SamplingParams(stop=" and"))
    assert deltas[-1] == " an"
    assert state.snapshot().outputs[0].finish_reason == "length"


def test_an_unfinished_character_comes_at_the_end_as_the_tokenizer_decodes_it() -> None:
    half = TOKENIZER.convert_tokens_to_ids("Ã")
    state, deltas, _ = follow("a", SamplingParams(), end_id=half)
    assert deltas == ["a", "\ufffd"]
    assert state.snapshot().outputs[0].text == TOKENIZER.decode(state.token_ids)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_has_text_only_if_asked_for(include: bool) -> None:
    params = SamplingParams(include_stop_str_in_output=include)
    state, _, _ = follow("ab", params, "stop", end_id=ids_of("c")[0])
    output = state.snapshot().outputs[0]
    assert output.text == ("abc" if include else "ab")
    assert output.token_ids == ids_of("abc")


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    assert follow("ab", SamplingParams(), end_id=EOS)[0].snapshot().outputs[0].text == "ab"
    shown = follow("ab", SamplingParams(skip_special_tokens=False), end_id=EOS)[0]
    assert shown.snapshot().outputs[0].text == "ab<eos>"


def test_a_stop_string_wins_over_length() -> None:
    state, _, _ = follow("abc", SamplingParams(stop="c"), "length")
    assert (state.finish_reason, state.stop_reason) == ("stop", "c")


def test_without_a_tokenizer_there_are_ids_only() -> None:
    processor = OutputProcessor(None)
    state = processor.add("r", None, [1, 2], SamplingParams())
    processor.process([StepOutput("r", (5,)), StepOutput("r", (6,), "stop", 6)])
    output = state.snapshot().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("", [5, 6], 6)
    with pytest.raises(RequestError, match=r"stop=\['x'\] needs a tokenizer"):
        processor.check_params(SamplingParams(stop="x"))
    processor.check_params(SamplingParams(stop_token_ids=[1]))


def test_abort_and_errors_finish_a_request() -> None:
    processor = OutputProcessor(TOKENIZER)
    aborted = processor.add("a", None, [1], SamplingParams(stop="xyz"))
    processor.process([StepOutput("a", (ids_of("x")[0],))])
    processor.abort("a")
    processor.abort("a")
    assert (aborted.finish_reason, aborted.snapshot().outputs[0].text) == ("abort", "x")
    failed, error = processor.add("b", None, [1], SamplingParams()), RuntimeError("no luck")
    assert processor.process([StepOutput("b", error=error), StepOutput("unknown")]) == [failed]
    assert failed.finished
    assert failed.error is error
