from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from inlay.backends.base import LoadedModel
from inlay.errors import OptionError, RequestError
from inlay.llm import LLM
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import LIMITS, FakeModel, assert_nothing_held, generate_alone
from tests.runtime.toy_tokenizers import byte_level
from tests.test_prompts import TEMPLATE

TOKENIZER = byte_level()
VOCAB_SIZE = len(TOKENIZER)
GREEDY = SamplingParams(temperature=0, max_tokens=10)
PROMPTS = ["a fox", "The quick brown dog jumps over", "x"]


class FakeEngine:
    """An engine around a FakeModel; the tokenizer is the toy one unless told otherwise."""

    def __init__(
        self,
        tokenizer: Any = TOKENIZER,
        generation_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = FakeModel(replace(LIMITS, vocab_size=VOCAB_SIZE))
        self.generation_config = generation_config or {}
        self.model_config = model_config or {"eos_token_id": []}
        self._tokenizer = tokenizer

    def load_model(self) -> LoadedModel:
        return self.model

    def tokenizer(self) -> Any:
        return self._tokenizer


def make_llm(**kwargs: Any) -> LLM:
    return LLM(FakeEngine(**kwargs), debug=True)


def alone(llm: LLM, prompt: str | list[int], params: SamplingParams) -> list[int]:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return generate_alone(llm._executor.model, ids, params, LIMITS.max_seq_len)[0]  # type: ignore[arg-type]


def interrupt_at(llm: LLM, step: int, error: BaseException) -> None:
    """Let the model raise once, at the given step from now on."""
    model = llm._executor.model
    assert isinstance(model, FakeModel)
    start = len(model.steps)

    def raise_once(number: int) -> None:
        if number == start + step:
            raise error

    model.before_forward = raise_once


def assert_usable(llm: LLM) -> None:
    llm._executor.step()
    assert_nothing_held(llm._executor)
    assert llm._processor._states == {}
    output = llm.generate("a fox", GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == alone(llm, "a fox", GREEDY)


def test_outputs_come_in_the_prompts_order() -> None:
    llm = make_llm()
    params = [replace(GREEDY, max_tokens=n) for n in (12, 3, 7)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    for output, one in zip(outputs, params, strict=True):
        (completion,) = output.outputs
        assert output.prompt is not None
        assert output.prompt_token_ids == TOKENIZER.encode(output.prompt)
        assert completion.token_ids == alone(llm, output.prompt, one)
        assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
        assert (output.finished, completion.finish_reason) == (True, "length")
        assert output.metrics.ttft is not None
    assert len({output.request_id for output in outputs}) == 3
    assert_usable(llm)


def test_more_prompts_than_fit_at_once() -> None:
    llm = make_llm()
    prompts = [[n, n + 1, n + 2] for n in range(40)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [alone(llm, p, GREEDY) for p in prompts]
    assert all(output.prompt is None for output in outputs)


def test_prompts_in_every_form() -> None:
    llm = make_llm()
    ids = TOKENIZER.encode("a fox")
    forms = ["a fox", ids, {"prompt": "a fox"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    outputs += llm.generate("a fox", GREEDY, use_tqdm=False)
    outputs += llm.generate(ids, GREEDY, use_tqdm=False)
    assert len(outputs) == 6
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "prompt 1: the prompt is empty"),
        ([], "prompt 1: the prompt is empty"),
        ([1] * 64, "prompt 1: the prompt has 64 tokens"),
        ([VOCAB_SIZE], rf"prompt 1: .*\[0, {VOCAB_SIZE}\).*given {VOCAB_SIZE} at position 0"),
        ([1, "a"], "prompt 1: .*given 'a' at position 1"),
        (None, "prompt 1: a prompt must be"),
    ],
)
def test_one_bad_prompt_is_named_and_nothing_is_queued(bad: Any, message: str) -> None:
    llm = make_llm()
    with pytest.raises(RequestError, match=message):
        llm.generate(["a fox", bad, "x"], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=message.replace("prompt 1", "prompt 0")):
        llm.stream(bad, GREEDY)
    assert not llm._executor.has_unfinished
    assert_usable(llm)


def test_bad_params_are_named() -> None:
    llm = make_llm()
    for params in ([GREEDY], [GREEDY, None], {"top_k": 1}, "greedy"):
        with pytest.raises(RequestError, match=r"sampling_params must be.* 2 of them"):
            llm.generate(["a", "b"], params, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompt 1: stop_token_ids must be"):
        llm.generate(
            ["a", "b"], [GREEDY, replace(GREEDY, stop_token_ids=[VOCAB_SIZE])], use_tqdm=False
        )
    assert_usable(llm)


def test_a_missing_tokenizer() -> None:
    llm = make_llm(tokenizer=None)
    assert llm.get_tokenizer() is None
    with pytest.raises(RequestError, match="prompt 0: a text prompt needs a tokenizer"):
        llm.generate("a fox", GREEDY)
    with pytest.raises(RequestError, match=r"prompt 0: stop=.*needs a tokenizer"):
        llm.generate([1, 2], replace(GREEDY, stop="x"))
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])
    output = llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.token_ids) == ("", alone(llm, [1, 2], GREEDY))
    given = LLM(FakeEngine(tokenizer=None), tokenizer=TOKENIZER)
    assert given.generate("a fox", GREEDY, use_tqdm=False)[0].outputs[0].text != ""


def test_stop_strings_end_requests_and_free_their_blocks() -> None:
    llm = make_llm()
    params = replace(GREEDY, max_tokens=40)
    text = llm.generate("a fox", params, use_tqdm=False)[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    steps = len(llm._executor.model.steps)  # type: ignore[attr-defined]
    output = llm.generate("a fox", replace(params, stop=[stop, "\0"]), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (expected, "stop", stop)
    assert len(llm._executor.model.steps) - steps == len(output.token_ids) < 40  # type: ignore[attr-defined]
    both = llm.generate(["a fox", "x"], [replace(params, stop=stop), params], use_tqdm=False)
    sizes = [step.num_requests for step in llm._executor.model.steps[-40:]]  # type: ignore[attr-defined]
    stopped_after = len(both[0].outputs[0].token_ids)
    assert sizes == [2] * stopped_after + [1] * (40 - stopped_after), "a stopped request ran on"
    kept = replace(params, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("a fox", kept, use_tqdm=False)[0].outputs[0].text == expected + stop
    pieces = [o.outputs[0].delta for o in llm.stream("a fox", replace(params, stop=stop))]
    assert "".join(pieces) == expected
    assert_usable(llm)


@pytest.mark.parametrize("source", ["generation_config", "generation_list", "model", "tokenizer"])
def test_where_the_end_of_sequence_comes_from(source: str) -> None:
    free = alone(make_llm(), "a fox", GREEDY)
    eos = free[3]
    configs: dict[str, dict[str, Any]] = {
        "generation_config": {"generation_config": {"eos_token_id": eos}},
        "generation_list": {"generation_config": {"eos_token_id": [0, eos]}},
        "model": {"model_config": {"eos_token_id": eos}},
        "tokenizer": {"model_config": {"eos_token_id": None}},
    }
    llm = make_llm(**configs[source])
    if source == "tokenizer":
        assert llm._executor.config.eos_token_ids == (TOKENIZER.eos_token_id,)
        return
    output = llm.generate("a fox", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == free[: free.index(eos) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.text == TOKENIZER.decode(output.token_ids[:-1])
    ignored = llm.generate("a fox", replace(GREEDY, ignore_eos=True), use_tqdm=False)
    assert ignored[0].outputs[0].token_ids == free


def test_the_models_own_sampling_defaults() -> None:
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 5}
    llm = make_llm(generation_config={**recommended, "top_k": 20, "pad_token_id": 0})
    assert llm._default_params == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, max_tokens=5
    )
    assert len(llm.generate("a fox", use_tqdm=False)[0].outputs[0].token_ids) == 5
    assert make_llm()._default_params == SamplingParams()
    assert make_llm(generation_config={"do_sample": False})._default_params.is_greedy


def test_streams_are_whole_characters_that_add_up() -> None:
    llm = make_llm()
    params = SamplingParams(temperature=2.0, seed=3, max_tokens=40)
    outputs = list(llm.stream("a fox", params))
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert "".join(output.outputs[0].delta for output in outputs) == last.outputs[0].text
    assert last.outputs[0].token_ids == alone(llm, "a fox", params)
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert counts == list(range(1, 41))
    for before, after in pairwise(outputs):
        assert after.outputs[0].text == before.outputs[0].text + after.outputs[0].delta
    assert_usable(llm)


def test_streams_and_generate_share_steps() -> None:
    llm = make_llm()
    streams = [llm.stream(prompt, replace(GREEDY, max_tokens=9)) for prompt in PROMPTS]
    first = [next(stream) for stream in streams]
    between = llm.generate(["a fox", "x"], replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in between] == [4, 4]
    for prompt, begun, stream in zip(PROMPTS, first, streams, strict=True):
        outputs = [begun, *stream]
        expected = alone(llm, prompt, replace(GREEDY, max_tokens=9))
        assert outputs[-1].outputs[0].token_ids == expected
        text = "".join(output.outputs[0].delta for output in outputs)
        assert text == outputs[-1].outputs[0].text == TOKENIZER.decode(expected)
    assert_usable(llm)


def test_a_closed_stream_ends_its_request() -> None:
    llm = make_llm()
    stream = llm.stream("a fox", GREEDY)
    assert not llm._executor.has_unfinished, "nothing runs before it is read"
    next(stream)
    assert llm._executor.has_unfinished
    stream.close()  # type: ignore[attr-defined]
    assert not llm._executor.has_unfinished
    assert_usable(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck")])
@pytest.mark.parametrize("step", [1, 3, 9])
def test_an_error_on_the_way_leaves_nothing_behind(error: BaseException, step: int) -> None:
    llm = make_llm()
    interrupt_at(llm, step, error)
    with pytest.raises(type(error)) as caught:
        llm.generate([[1, 2, 3]] * 20, GREEDY, use_tqdm=False)
    assert caught.value is error
    assert_usable(llm)


def test_an_error_reaches_every_stream_of_its_step() -> None:
    llm = make_llm()
    stream = llm.stream("a fox", GREEDY)
    next(stream)
    interrupt_at(llm, 2, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        llm.generate(["x"], GREEDY, use_tqdm=False)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(stream)
    assert_usable(llm)


def test_an_interrupt_reaches_every_stream_of_its_step() -> None:
    llm = make_llm()
    stream = llm.stream("a fox", GREEDY)
    next(stream)
    interrupt_at(llm, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x"], GREEDY, use_tqdm=False)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert_usable(llm)


def test_chat() -> None:
    llm = make_llm()
    messages = [{"role": "user", "content": "fox"}]
    with pytest.raises(RequestError, match="prompt 0: the tokenizer has no chat template"):
        llm.chat(messages, GREEDY, use_tqdm=False)
    expected = alone(llm, "<user>fox\n<assistant>", GREEDY)
    one = llm.chat(messages, GREEDY, use_tqdm=False, chat_template=TEMPLATE)
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False, chat_template=TEMPLATE)
    assert [output.outputs[0].token_ids for output in one + two] == [expected] * 3
    assert one[0].prompt == "<user>fox\n<assistant>"
    *_, last = llm.stream_chat(messages, GREEDY, chat_template=TEMPLATE)
    assert last.outputs[0].token_ids == expected


def test_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    llm = make_llm()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "Generating: 100%" in shown
    assert "output tok/s" in shown


def test_options_reach_the_executor_and_others_are_refused() -> None:
    llm = LLM(FakeEngine(), max_num_seqs=2, kv_cache_tokens=128)
    assert llm._executor.limits.max_num_seqs == 2
    assert llm._executor.kv_cache.num_blocks == 32
    with pytest.raises(OptionError, match="max_num_seqs can be at most 6"):
        LLM(FakeEngine(), max_num_seqs=7)
    with pytest.raises(OptionError, match=r"knows no option 'dtype'; allowed: .*kv_cache_tokens"):
        LLM(FakeEngine(), dtype="bfloat16")
    with pytest.raises(OptionError, match="no tokenizer at tokenizer='/nowhere'"):
        LLM(FakeEngine(), tokenizer="/nowhere")


def test_what_must_not_come_does_not() -> None:
    llm = make_llm()
    free = llm.generate("ab", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    token = free.outputs[0].token_ids[2]
    bad = SamplingParams(temperature=0, max_tokens=12, bad_words_ids=[[token]], min_tokens=12)
    banned = llm.generate("ab", bad, use_tqdm=False)[0].outputs[0]
    assert token not in banned.token_ids
    assert len(banned.token_ids) == 12
    with pytest.raises(RequestError, match=r"prompt 0: logit_bias must be integers in \[0, "):
        llm.generate("ab", SamplingParams(logit_bias={10**6: 1.0}), use_tqdm=False)
