from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from inlay.errors import OptionError, RequestError
from inlay.llm import LLM
from inlay.model_source import open_engine
from inlay.runtime.detokenizer import ByteDetokenizer, DetokenizerFactory
from inlay.runtime.sampling_params import SamplingParams
from tests.fake_llm import (
    GREEDY,
    PROMPTS,
    TOKENIZER,
    VOCAB_SIZE,
    FakeEngine,
    FakeLLM,
    alone,
    assert_usable,
    fail_at,
    slow_down,
)
from tests.test_prompts import TEMPLATE


@pytest.fixture
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as llm:
        yield llm


def test_outputs_come_in_the_prompts_order(llm: FakeLLM) -> None:
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


def test_more_prompts_than_fit_at_once(llm: FakeLLM) -> None:
    prompts = [[n, n + 1, n + 2] for n in range(40)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [alone(llm, p, GREEDY) for p in prompts]
    assert all(output.prompt is None for output in outputs)


def test_prompts_in_every_form(llm: FakeLLM) -> None:
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
def test_one_bad_prompt_is_named_and_nothing_is_queued(
    llm: FakeLLM, bad: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["a fox", bad, "x"], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=message.replace("prompt 1", "prompt 0")):
        llm.stream(bad, GREEDY)
    assert len(llm.model.steps) == 0
    assert_usable(llm)


def test_bad_params_are_named(llm: FakeLLM) -> None:
    for params in ([GREEDY], [GREEDY, None], {"top_k": 1}, "greedy"):
        with pytest.raises(RequestError, match=r"sampling_params must be.* 2 of them"):
            llm.generate(["a", "b"], params, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompt 1: stop_token_ids must be"):
        llm.generate(
            ["a", "b"], [GREEDY, replace(GREEDY, stop_token_ids=[VOCAB_SIZE])], use_tqdm=False
        )
    assert_usable(llm)


def test_a_missing_tokenizer() -> None:
    llm = FakeLLM(tokenizer=None)
    assert llm.get_tokenizer() is None
    with pytest.raises(RequestError, match="prompt 0: a text prompt needs a tokenizer"):
        llm.generate("a fox", GREEDY)
    with pytest.raises(RequestError, match=r"prompt 0: stop=.*needs a tokenizer"):
        llm.generate([1, 2], replace(GREEDY, stop="x"))
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])
    output = llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.token_ids) == ("", alone(llm, [1, 2], GREEDY))
    given = LLM(FakeEngine(tokenizer=None), tokenizer=TOKENIZER, in_process=True)
    assert given.generate("a fox", GREEDY, use_tqdm=False)[0].outputs[0].text != ""


def test_stop_strings_end_requests_and_free_their_blocks(llm: FakeLLM) -> None:
    params = replace(GREEDY, max_tokens=40)
    text = llm.generate("a fox", params, use_tqdm=False)[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    output = llm.generate("a fox", replace(params, stop=[stop, "\0"]), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (expected, "stop", stop)
    assert len(output.token_ids) < 40
    # The executor learns of it a little later, but long before it would have ended the request.
    slow_down(llm)
    both = llm.generate(["a fox", "x"], [replace(params, stop=stop), params], use_tqdm=False)
    assert len(both[1].outputs[0].token_ids) == 40
    sizes = [step.num_requests for step in llm.model.steps[-40:]]
    stopped_after = len(both[0].outputs[0].token_ids)
    assert sizes[:stopped_after] == [2] * stopped_after
    assert sizes[stopped_after + 5 :] == [1] * (35 - stopped_after), "a stopped request ran on"
    kept = replace(params, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("a fox", kept, use_tqdm=False)[0].outputs[0].text == expected + stop
    pieces = [o.outputs[0].delta for o in llm.stream("a fox", replace(params, stop=stop))]
    assert "".join(pieces) == expected
    assert_usable(llm)


@pytest.mark.parametrize("source", ["generation_config", "generation_list", "model", "tokenizer"])
def test_where_the_end_of_sequence_comes_from(source: str) -> None:
    free = alone(FakeLLM(), "a fox", GREEDY)
    eos = free[3]
    configs: dict[str, dict[str, Any]] = {
        "generation_config": {"generation_config": {"eos_token_id": eos}},
        "generation_list": {"generation_config": {"eos_token_id": [0, eos]}},
        "model": {"model_config": {"eos_token_id": eos}},
        "tokenizer": {"model_config": {"eos_token_id": None}},
    }
    llm = FakeLLM(**configs[source])
    if source == "tokenizer":
        config = open_engine(FakeEngine(model_config={"eos_token_id": None}), None, {})[2]
        assert config.eos_token_ids == (TOKENIZER.eos_token_id,)
        return
    output = llm.generate("a fox", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == free[: free.index(eos) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.text == TOKENIZER.decode(output.token_ids[:-1])
    ignored = llm.generate("a fox", replace(GREEDY, ignore_eos=True), use_tqdm=False)
    assert ignored[0].outputs[0].token_ids == free


def test_the_models_own_sampling_defaults() -> None:
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 5}
    llm = FakeLLM(generation_config={**recommended, "top_k": 20, "pad_token_id": 0})
    assert llm._maker.default_params == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, max_tokens=5
    )
    assert len(llm.generate("a fox", use_tqdm=False)[0].outputs[0].token_ids) == 5
    assert FakeLLM()._maker.default_params == SamplingParams()
    assert FakeLLM(generation_config={"do_sample": False})._maker.default_params.is_greedy


def test_streams_are_whole_characters_that_add_up(llm: FakeLLM) -> None:
    params = SamplingParams(temperature=2.0, seed=3, max_tokens=40)
    outputs = list(llm.stream("a fox", params))
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert "".join(output.outputs[0].delta for output in outputs) == last.outputs[0].text
    assert last.outputs[0].token_ids == alone(llm, "a fox", params)
    assert all(output.outputs[0].delta for output in outputs[:-1]), "an empty piece"
    for before, after in pairwise(outputs):
        assert after.outputs[0].text == before.outputs[0].text + after.outputs[0].delta
    assert_usable(llm)


def test_streams_and_generate_share_steps(llm: FakeLLM) -> None:
    slow_down(llm)
    streams = [llm.stream(prompt, replace(GREEDY, max_tokens=40)) for prompt in PROMPTS]
    first = [next(stream) for stream in streams]
    between = llm.generate(["a fox", "x"], replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in between] == [4, 4]
    assert max(step.num_requests for step in llm.model.steps) == 5
    for prompt, begun, stream in zip(PROMPTS, first, streams, strict=True):
        outputs = [begun, *stream]
        expected = alone(llm, prompt, replace(GREEDY, max_tokens=40))
        assert outputs[-1].outputs[0].token_ids == expected
        text = "".join(output.outputs[0].delta for output in outputs)
        assert text == outputs[-1].outputs[0].text == TOKENIZER.decode(expected)
    assert_usable(llm)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("ended", ["closed", "dropped"])
def test_an_abandoned_stream_ends_its_request(llm: FakeLLM, begun: bool, ended: str) -> None:
    slow_down(llm, 0.05)
    stream = llm.stream("a fox", replace(GREEDY, max_tokens=None))
    if begun:
        next(stream)
    stats = llm.get_stats()
    assert stats["num_running"] + stats["num_waiting"] == 1
    if ended == "closed":
        stream.close()  # type: ignore[attr-defined]
    else:
        del stream
    assert_usable(llm)
    assert llm.get_stats()["api"]["num_finished"] == {"abort": 1, "length": 1}


def test_ctrl_c_ends_a_calls_requests(llm: FakeLLM) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(number: int) -> None:
        time.sleep(0.005)
        if number == 5:
            signal.pthread_kill(main, signal.SIGINT)

    llm.model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]] * 20, replace(GREEDY, max_tokens=None), use_tqdm=False)
    assert len(llm.model.steps) < 60
    assert_usable(llm)


@pytest.mark.parametrize("step", [1, 3])
def test_a_failing_step_fails_its_requests_only(
    llm: FakeLLM, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(llm, step, RuntimeError("out of luck"))
    outputs = llm.generate([[1, 2, 3]] * 20, GREEDY, use_tqdm=False)
    failed = [output for output in outputs if output.error is not None]
    assert len(failed) == 6, "max_num_seqs run in a step"
    for output in outputs:
        completion = output.outputs[0]
        if output.error is None:
            assert completion.token_ids == alone(llm, [1, 2, 3], GREEDY)
        else:
            assert (output.finished, completion.finish_reason) == (True, "error")
            assert str(output.error) == "out of luck"
            assert len(completion.token_ids) == step - 1, "what came is kept"
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert messages == [f"request {o.request_id} failed: out of luck" for o in failed]
    assert_usable(llm)


def test_an_error_reaches_every_stream_of_its_step(llm: FakeLLM) -> None:
    slow_down(llm)
    stream = llm.stream("a fox", replace(GREEDY, max_tokens=40))
    next(stream)
    fail_at(llm, 2, RuntimeError("out of luck"))
    *_, last = stream
    assert (str(last.error), last.outputs[0].finish_reason) == ("out of luck", "error")
    assert_usable(llm)


def test_a_fault_of_the_tokenizer_is_its_requests_alone(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ByteDetokenizer.append

    def fail_for_one(self: ByteDetokenizer, token_ids: Sequence[int]) -> str:
        if getattr(self, "is_cursed", False):
            raise ValueError("no such text")
        return append(self, token_ids)

    make = DetokenizerFactory.make

    def cursed(self: DetokenizerFactory, prompt: Sequence[int], skip: bool) -> Any:
        made: Any = make(self, prompt, skip)
        made.is_cursed = list(prompt) == [7, 7]
        return made

    monkeypatch.setattr(ByteDetokenizer, "append", fail_for_one)
    monkeypatch.setattr(DetokenizerFactory, "make", cursed)
    bad, good = llm.generate([[7, 7], [8, 8]], GREEDY, use_tqdm=False)
    assert (str(bad.error), bad.outputs[0].finish_reason) == ("no such text", "error")
    assert good.outputs[0].token_ids == alone(llm, [8, 8], GREEDY)
    assert_usable(llm)


def test_chat(llm: FakeLLM) -> None:
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
    *_, last = llm.stream_chat(messages, GREEDY, chat_template=TEMPLATE, timeout=1e-9)
    assert last.outputs[0].finish_reason == "timeout"
    with pytest.raises(RequestError, match="chat_template_kwargs must be None or a dict"):
        llm.chat(messages, chat_template=TEMPLATE, chat_template_kwargs=5)


def test_progress_bars(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "Generating: 100%" in shown
    assert "output tok/s" in shown


def test_options_reach_the_executor_and_others_are_refused() -> None:
    llm = FakeLLM(max_num_seqs=2, kv_cache_tokens=128)
    assert llm._frontend.client.admission.limits.max_num_seqs == 2
    with pytest.raises(RequestError, match=r"has 16 blocks"):
        FakeLLM(kv_cache_tokens=64).generate([[1]], SamplingParams(n=6, max_tokens=None))
    with pytest.raises(OptionError, match="max_num_seqs can be at most 6"):
        FakeLLM(max_num_seqs=7)
    with pytest.raises(OptionError, match=r"knows no option 'dtype'; allowed: .*kv_cache_tokens"):
        FakeLLM(dtype="bfloat16")
    with pytest.raises(OptionError, match="no tokenizer at tokenizer='/nowhere'"):
        LLM(FakeEngine(), tokenizer="/nowhere", in_process=True)
    with pytest.raises(OptionError, match="max_queue_size must be None or an integer >= 1"):
        FakeLLM(max_queue_size=0)
    with pytest.raises(OptionError, match="seed must be None or an integer >= 0; given 'x'"):
        FakeLLM(seed="x")


def test_what_must_not_come_does_not(llm: FakeLLM) -> None:
    free = llm.generate("ab", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    token = free.outputs[0].token_ids[2]
    bad = SamplingParams(temperature=0, max_tokens=12, bad_words_ids=[[token]], min_tokens=12)
    banned = llm.generate("ab", bad, use_tqdm=False)[0].outputs[0]
    assert token not in banned.token_ids
    assert len(banned.token_ids) == 12
    with pytest.raises(RequestError, match=r"prompt 0: logit_bias must be integers in \[0, "):
        llm.generate("ab", SamplingParams(logit_bias={10**6: 1.0}), use_tqdm=False)
