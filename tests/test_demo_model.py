"""The demo model that ships in the package: complete, small, and a model of language."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent.parent / "src" / "inlay" / "demo_model"
FILES = {
    "LICENSE.python.txt",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "heldout_c.txt.gz",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# The shipped weights score 72.5 on the first 2,048 held-out tokens (bfloat16 arithmetic 72.3), so
# another machine's sums stay well within 10 %. The mildest known-bad twin below scores 107, token
# frequencies alone 766 on the whole text, an untrained model about 4,096.
NUM_TOKENS = 2048
MAX_PERPLEXITY = 80.0


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two spinning threads beside a busy neighbour cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def held_out_ids(tokenizer):
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    return tokenizer(text[:20_000], return_tensors="pt")["input_ids"][0, 1 : NUM_TOKENS + 1]


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:  # ids [num_tokens], a multiple of 512
    rows = F.pad(ids.view(-1, 512), (1, 0), value=model.config.bos_token_id)
    logits = model(rows[:, :-1]).logits
    return math.exp(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_files_are_complete_and_small():
    present = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert present >= FILES
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8_000_000


def test_shape(model, tokenizer):
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert model.num_parameters() <= 3_500_000
    head_dim = config.head_dim
    sizes = [
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_attention_heads * head_dim,
        config.num_key_value_heads * head_dim,
    ]
    assert [size % 128 for size in sizes] == [0] * 5
    assert config.num_key_value_heads < config.num_attention_heads
    assert len(tokenizer) == config.vocab_size
    assert AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading, trailing  \n\n\t",
        "naïve café, Ελληνικά, кириллица, 漢字, हिन्दी, العربية",
        "👩‍👩‍👧‍👦 \U0001f9ff e\u0301 \u200b\ufeff\u2028",
        "\x00\x01\x7f\x80\uffff\U0010ffff\r\n\r",
        "def f(x):\n    return x ** 2  # '''",
        "<|not special|> <| user |> </s> [PAD]",
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]


def test_tokenizer_knows_every_byte(tokenizer):
    pieces = {tokenizer.decode([index]) for index in range(len(tokenizer))}
    assert {chr(byte) for byte in range(128)} <= pieces


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is re?"},
        {"role": "assistant", "content": "A module."},
        {"role": "user", "content": "Why?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>What is re?<|end|>"
        "<|assistant|>A module.<|end|><|user|>Why?<|end|><|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(Exception, match="role must be"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_generation_stops_at_the_end_of_a_turn(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]


def test_held_out_perplexity(model, held_out_ids):
    assert len(held_out_ids) == NUM_TOKENS
    assert perplexity(model, held_out_ids) < MAX_PERPLEXITY


@pytest.mark.parametrize("twin", ["layers reversed", "no rope", "no attention scale"])
def test_perplexity_tells_right_from_wrong(model, held_out_ids, twin):
    bad = copy.deepcopy(model)
    if twin == "layers reversed":
        bad.model.layers = torch.nn.ModuleList(reversed(bad.model.layers))
    elif twin == "no rope":
        bad.model.rotary_emb.inv_freq.zero_()
    else:
        for layer in bad.model.layers:
            layer.self_attn.scaling = 1.0
    assert perplexity(bad, held_out_ids) > 1.2 * perplexity(model, held_out_ids)


def test_greedy_words_vary(model, tokenizer):
    prompts = ["The with statement", "Return a list of", "When an exception is raised,"]
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert len(set(output[0, inputs["input_ids"].shape[1] :].tolist())) >= 12
