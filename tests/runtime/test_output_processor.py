from __future__ import annotations

import threading

import pytest

from inlay.errors import EngineError, RequestError
from inlay.runtime.output_processor import OutputProcessor
from inlay.runtime.output_state import Delivered, OutputState
from inlay.runtime.outputs import FinishReason, Logprob, StepOutput
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
    deltas, delivered = [], Delivered()
    for number, token in enumerate(ids, 1):
        reason = end if number == len(ids) else None
        processor.process([StepOutput("r", (token,), reason)])
        assert len(state.sequences[0].token_ids) == number
        deltas.append(state.snapshot(delivered).outputs[0].delta)
        if state.finished:
            processor.process([StepOutput("r", (token,))])
            assert len(state.sequences[0].token_ids) == number
            return state, deltas, number
    return state, deltas, len(ids)


def test_text_and_metrics() -> None:
    state, deltas, _ = follow("hello", SamplingParams())
    output = state.snapshot()
    (completion,) = output.outputs
    assert (completion.text, completion.token_ids) == ("hello", ids_of("hello"))
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert deltas == list("hello")
    assert completion.delta == "hello", "who has not read before lacks all of it"
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
    output = state.snapshot().outputs[0]
    assert output.text == TOKENIZER.decode(output.token_ids)


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
    output = state.snapshot().outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", "c")


def test_without_a_tokenizer_there_are_ids_only() -> None:
    processor = OutputProcessor(None)
    state = processor.add("r", None, [1, 2], SamplingParams())
    processor.process([StepOutput("r", (5,)), StepOutput("r", (6,), "stop", 6)])
    output = state.snapshot().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("", [5, 6], 6)


def test_abort_and_errors_finish_a_request() -> None:
    processor = OutputProcessor(TOKENIZER)
    aborted = processor.add("a", None, [1], SamplingParams(stop="xyz"))
    processor.process([StepOutput("a", (ids_of("x")[0],))])
    processor.abort("a")
    processor.abort("a")
    completion = aborted.snapshot().outputs[0]
    assert (completion.finish_reason, completion.text) == ("abort", "x")
    failed, error = processor.add("b", None, [1], SamplingParams()), RuntimeError("no luck")
    processor.process([StepOutput("b", finish_reason="error", error=error), StepOutput("unknown")])
    assert failed.finished
    assert failed.snapshot().error is error
    assert processor.num_finished == {"abort": 1, "error": 1}
    assert processor.num_unfinished == 0


@pytest.mark.parametrize("reason", ["timeout", "abort", "error"])
def test_what_ends_a_request_from_outside_ends_all_its_sequences(reason: FinishReason) -> None:
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, [1], SamplingParams(n=3, seed=1))
    a, b = ids_of("ab")
    processor.process([StepOutput("r", (a,)), StepOutput("r", (b,), "length", index=1)])
    error = RuntimeError("no luck") if reason == "error" else None
    processor.process([StepOutput("r", finish_reason=reason, error=error)])
    processor.process([StepOutput("r", (a,), "length", index=2)])
    outputs = state.snapshot().outputs
    assert [(one.text, one.finish_reason) for one in outputs] == [
        ("a", reason),
        ("b", "length"),
        ("", reason),
    ]


def test_an_error_ends_a_request_whose_first_sequence_has_ended() -> None:
    processor, error = OutputProcessor(TOKENIZER), RuntimeError("no luck")
    state = processor.add("r", None, [1], SamplingParams(n=2, seed=1))
    processor.process([StepOutput("r", (ids_of("a")[0],), "length")])
    processor.process([StepOutput("r", finish_reason="error", error=error)])
    outputs = state.snapshot().outputs
    assert [(one.text, one.finish_reason) for one in outputs] == [("a", "length"), ("", "error")]
    assert state.snapshot().error is error


def test_a_stop_string_ends_its_sequence_only() -> None:
    stopped: list[tuple[str, int | None]] = []
    processor = OutputProcessor(TOKENIZER, lambda name, index: stopped.append((name, index)))
    state = processor.add("r", None, [1], SamplingParams(n=2, seed=1, stop="b"))
    a, b = ids_of("ab")
    processor.process([StepOutput("r", (a,)), StepOutput("r", (b,), index=1)])
    assert stopped == [("r", 1)]
    processor.process([StepOutput("r", (a,), index=1), StepOutput("r", (a,))])
    assert [len(one.token_ids) for one in state.snapshot().outputs] == [2, 1]
    processor.process([StepOutput("r", (b,))])
    assert stopped == [("r", 1), ("r", None)]
    assert [one.text for one in state.snapshot().outputs] == ["aa", ""]


def test_tokens_behind_a_stop_string_do_not_count_however_they_come() -> None:
    ids = ids_of("ab.cd")
    places = tuple({token: Logprob(-1.0, 1)} for token in ids)
    params = SamplingParams(stop=".", logprobs=0)
    for size in (1, 2, 5):
        processor = OutputProcessor(TOKENIZER)
        state = processor.add("r", None, [1], params)
        for start in range(0, len(ids), size):
            chunk = slice(start, start + size)
            processor.process([StepOutput("r", tuple(ids[chunk]), logprobs=places[chunk])])
        output = state.snapshot().outputs[0]
        assert (output.text, output.token_ids, output.stop_reason) == ("ab", ids[:3], ".")
        assert output.cumulative_logprob == -3.0
        assert output.logprobs is not None
        assert len(output.logprobs) == 3


def test_the_best_are_chosen_at_the_end() -> None:
    processor = OutputProcessor(TOKENIZER)
    params = SamplingParams(n=2, best_of=3, seed=1)
    state = processor.add("r", None, [1], params, is_stream=True)
    for index, (token, logprob) in enumerate(zip(ids_of("abc"), (-3.0, -1.0, -2.0), strict=True)):
        assert not state.has_news(Delivered())
        assert state.snapshot().outputs == []
        output = StepOutput("r", (token,), "length", index=index, cumulative_logprob=logprob)
        processor.process([output])
    outputs = state.snapshot().outputs
    assert [(one.index, one.text, one.cumulative_logprob) for one in outputs] == [
        (0, "b", -1.0),
        (1, "c", -2.0),
    ]


def test_beams_keep_the_order_of_their_search() -> None:
    """Which a length penalty makes another than that of their probabilities."""
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, [1], SamplingParams(n=2, best_of=4, use_beam_search=True))
    for index, logprob in enumerate((-3.0, -1.0)):
        token = ids_of("ab")[index]
        output = StepOutput("r", (token,), "length", index=index, cumulative_logprob=logprob)
        processor.process([output])
    assert state.finished
    assert [one.text for one in state.snapshot().outputs] == ["a", "b"]


def test_a_piece_is_due_when_there_is_text_to_show() -> None:
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, [1], SamplingParams(stop="abc"), is_stream=True)
    seen = Delivered()
    due = []
    for token in ids_of("xabaz"):
        processor.process([StepOutput("r", (token,))])
        due.append(state.has_news(seen))
        if due[-1]:
            state.snapshot(seen)
    assert due == [True, False, False, True, True]
    processor.process([StepOutput("r", finish_reason="length")])
    assert state.has_news(seen)
    assert state.snapshot(seen).outputs[0].delta == ""
    silent = processor.add("s", None, [1], SamplingParams(), is_stream=False)
    processor.process([StepOutput("s", tuple(ids_of("a")))])
    assert not silent.has_news(Delivered())


def test_two_readers_have_deltas_of_their_own() -> None:
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, [1], SamplingParams(), is_stream=True)
    slow, quick = Delivered(), Delivered()
    for token in ids_of("ab"):
        processor.process([StepOutput("r", (token,))])
        assert len(state.snapshot(quick).outputs[0].delta) == 1
    assert state.snapshot(slow).outputs[0].delta == "ab"


def test_what_comes_beside_tokens() -> None:
    processor = OutputProcessor(TOKENIZER)
    state = processor.add("r", None, [1, 2], SamplingParams(prompt_logprobs=0))
    logprobs = (None, {2: Logprob(-1.5, 4)})
    first = StepOutput("r", prompt_logprobs=logprobs, num_cached_tokens=1, scheduled_time=5.0)
    processor.process([first, StepOutput("r", tuple(ids_of("ab")), "length")])
    output = state.snapshot()
    assert output.prompt_logprobs is not None
    assert [output.prompt_logprobs[0], *output.prompt_logprobs[1]] == [None, 2]
    metrics = output.metrics
    assert (metrics.scheduled_time, metrics.num_cached_tokens) == (5.0, 1)
    assert (metrics.num_output_tokens, output.num_cached_tokens) == (2, 1)
    assert metrics.mean_itl is not None
    embedded = processor.add("e", None, [1], SamplingParams())
    processor.process([StepOutput("e", finish_reason="stop", embedding=(0.5, 0.5))])
    assert (embedded.finished, embedded.embedding) == (True, (0.5, 0.5))


def test_too_many_requests() -> None:
    processor = OutputProcessor(None, max_queue_size=2)
    for name in ("a", "b"):
        processor.add(name, None, [1], SamplingParams())
    with pytest.raises(RequestError, match=r"overloaded: 2 requests.*max_queue_size is 2"):
        processor.add("c", None, [1], SamplingParams())
    threading.Timer(0.05, processor.abort, ["a"]).start()
    processor.add("c", None, [1], SamplingParams(), wait=True)
    assert processor.num_unfinished == 2


def test_the_engines_end_is_told_from_a_requests() -> None:
    """An error of another class than ours comes from the worker as an EngineError too."""
    alive = True
    processor = OutputProcessor(None, is_alive=lambda: alive)
    states = [processor.add(name, None, [1], SamplingParams()) for name in "abc"]
    own = EngineError("KeyError: 'x'")
    processor.process([StepOutput("a", finish_reason="error", error=own)])
    alive, end = False, EngineError("the worker was killed")
    processor.process([StepOutput("b", finish_reason="error", error=end)])
    processor.fail_all(end)
    assert [state.engine_error for state in states] == [None, end, end]
    assert [state.error for state in states] == [own, end, end]
