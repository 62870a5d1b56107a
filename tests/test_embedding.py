"""`embed` and `score` against Hugging Face, on the eager backend."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from inlay import LLM, compile_model
from inlay.embedding import default_pooling
from inlay.errors import OptionError, RequestError, UnsupportedModelError
from tests.fake_llm import GREEDY, FakeLLM, fail_at
from tests.runtime.toy_tokenizers import byte_level
from tests.toys import build_toy

PROMPTS = [[5, 9, 17, 33, 6], [8] * 3 + [120, 77], [12], list(range(3, 90))]
TOLERANCE = 1e-4
"""Of float32, as everywhere between us and Hugging Face (DESIGN.md section 9)."""


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    return build_toy("llama")


@pytest.fixture(scope="module")
def llm(decoder: PreTrainedModel) -> Iterator[LLM]:
    options = {"dtype": "float32", "block_size": 16, "max_num_tokens": 64, "max_num_seqs": 4}
    with LLM(decoder, backend="eager", in_process=True, kv_cache_tokens=512, **options) as llm:
        yield llm


def hidden(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The final hidden states [n, hidden]."""
    with torch.no_grad():
        return model.base_model(torch.tensor([ids])).last_hidden_state[0]


def pooled(states: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    by = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return by / by.norm() if normalize else by


def check(llm: LLM, model: PreTrainedModel, expected: str, **options: object) -> None:
    normalize = bool(options.get("normalize", True))
    outputs = llm.embed(PROMPTS, use_tqdm=False, **options)  # type: ignore[arg-type]
    for ids, output in zip(PROMPTS, outputs, strict=True):
        ours = torch.tensor(output.outputs.embedding)
        theirs = pooled(hidden(model, ids), expected, normalize)
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
        assert output.prompt_token_ids == ids
        assert (output.finished, output.error) == (True, None)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_decoders_embeddings(
    llm: LLM, decoder: PreTrainedModel, pooling: str, normalize: bool
) -> None:
    """One prompt is longer than a step."""
    check(llm, decoder, pooling, pooling=pooling, normalize=normalize)


def test_a_decoder_takes_the_last_token(llm: LLM, decoder: PreTrainedModel) -> None:
    check(llm, decoder, "last")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_an_encoders_embeddings(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    model.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    config = tmp_path / "1_Pooling" / "config.json"
    options = {"backend": "eager", "dtype": "float32", "block_size": 16}
    config.write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    engine = compile_model(tmp_path, **options)  # type: ignore[arg-type]
    with LLM(engine, in_process=True, tokenizer=byte_level()) as llm:
        check(llm, model, "cls")
        for pooling in ("mean", "cls", "last"):
            check(llm, model, pooling, pooling=pooling)
        calls = (llm.generate, llm.score, llm.stream, llm.generate_async)
        for call in calls:
            with pytest.raises(UnsupportedModelError, match="is an encoder: it does not generate"):
                call([1, 2])  # type: ignore[operator]
        with pytest.raises(UnsupportedModelError, match="is an encoder"):
            llm.batch(tmp_path / "in", tmp_path / "out")
    with LLM(model, in_process=True, **options) as llm:  # type: ignore[arg-type]
        check(llm, model, "mean")


def test_where_the_default_comes_from() -> None:
    assert default_pooling({}, is_encoder=True) == "mean"
    assert default_pooling({}, is_encoder=False) == "last"
    last = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    assert default_pooling(last, is_encoder=True) == "last"
    with pytest.raises(OptionError, match="asks for pooling_mode_max_tokens; built are"):
        default_pooling({"pooling_mode_max_tokens": True}, is_encoder=True)
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    with pytest.raises(OptionError, match=r"pooling_mode_cls_token, pooling_mode_mean.*pooling="):
        default_pooling(both, is_encoder=True)


def test_scores(llm: LLM, decoder: PreTrainedModel) -> None:
    prompts = [ids for ids in PROMPTS if len(ids) > 1]
    outputs = llm.score(prompts, use_tqdm=False)
    outputs += llm.score(prompts[:1], use_tqdm=False)  # now with a prefix that might be cached
    for ids, output in zip([*prompts, prompts[0]], outputs, strict=True):
        with torch.no_grad():
            logits = decoder(torch.tensor([ids])).logits[0]
        table = logits[:-1].log_softmax(-1)
        expected = table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert output.logprobs[0] is None
        ours = torch.tensor(output.logprobs[1:])
        # A log probability is a difference of logits: their tolerance counts twice.
        assert (ours - expected).abs().max() <= 2 * TOLERANCE * logits.square().mean().sqrt()
        assert output.num_scored == len(ids) - 1
        assert output.sum_logprob == pytest.approx(expected.sum().item(), rel=1e-4)
        assert output.mean_logprob == pytest.approx(expected.mean().item(), rel=1e-4)
        assert output.perplexity == pytest.approx(math.exp(-expected.mean().item()), rel=1e-3)
    with pytest.raises(RequestError, match=r"prompt 1: a score needs two tokens.*given \[12\]"):
        llm.score([[1, 2], [12]])


def test_failures_are_told() -> None:
    with FakeLLM() as llm:
        fail_at(llm, 1, RuntimeError("out of luck"))
        (output,) = llm.embed("a fox", use_tqdm=False)
        assert (output.outputs.embedding, str(output.error)) == ([], "out of luck")
        fail_at(llm, 1, RuntimeError("out of luck"))
        (score,) = llm.score("a fox", use_tqdm=False)
        assert (score.logprobs, str(score.error)) == ([], "out of luck")
        assert math.isnan(score.perplexity)
        with pytest.raises(RequestError, match="pooling must be None"):
            llm.embed("x", pooling="max")  # type: ignore[arg-type]
        assert llm.generate("x", GREEDY, use_tqdm=False)[0].finished


def test_tokens_and_text() -> None:
    with FakeLLM() as llm:
        ids = llm.tokenize("a fox")
        assert ids == byte_level().encode("a fox")
        assert llm.detokenize([*ids, 0]) == "a fox<eos>"
        for text in (5, None, ["a"], "\ud800"):
            with pytest.raises(RequestError, match=r"str; given|no valid Unicode"):
                llm.tokenize(text)  # type: ignore[arg-type]
        for wrong in (5, None, "a", ["a"], [-1], [10**30]):
            with pytest.raises(RequestError, match="token_ids must be a list of token ids"):
                llm.detokenize(wrong)  # type: ignore[arg-type]
        assert llm.detokenize([*ids, 0], skip_special_tokens=True) == "a fox"
    with FakeLLM(tokenizer=None) as llm:
        for call, given in ((llm.tokenize, "x"), (llm.detokenize, [1])):
            with pytest.raises(RequestError, match=r"no tokenizer: give LLM\(tokenizer=\.\.\.\)"):
                call(given)  # type: ignore[operator]


def test_a_request_that_was_ended_says_so() -> None:
    with FakeLLM() as llm:
        (output,) = llm.embed([[5] * 20], timeout=1e-9, use_tqdm=False)
        assert output.outputs.embedding == []
        assert "finish_reason 'timeout'" in str(output.error)
