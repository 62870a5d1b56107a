from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from inlay.errors import RequestError
from inlay.prompts import (
    as_conversations,
    as_prompt_list,
    encode_bad_words,
    encode_prompt,
    render_chat,
)
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.toy_tokenizers import byte_level

TOKENIZER = byte_level()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("text", ["a\ud800b", b"a\xff".decode(errors="surrogateescape")])
def test_half_characters_are_no_text(text: str) -> None:
    with pytest.raises(RequestError, match=r"no valid Unicode: .* at position 1"):
        encode_prompt(text, TOKENIZER)
    with pytest.raises(RequestError, match="no valid Unicode"):
        render_chat([{"role": "user", "content": text}], TOKENIZER, chat_template=TEMPLATE)


@pytest.mark.parametrize("messages", [5, "hi", [], ["hi"], [[{"role": "user"}]], None])
def test_what_is_no_conversation(messages: Any) -> None:
    with pytest.raises(RequestError, match=r"messages must be a list like .*given"):
        render_chat(messages, TOKENIZER, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("prompts", "listed"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [(1, 2)]),
        ([[1, 2], "hi"], [[1, 2], "hi"]),
        ({"prompt": "hi"}, [{"prompt": "hi"}]),
        (
            [{"prompt": "hi"}, {"prompt_token_ids": [1]}],
            [{"prompt": "hi"}, {"prompt_token_ids": [1]}],
        ),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_one_prompt_or_many(prompts: Any, listed: list[Any]) -> None:
    assert as_prompt_list(prompts) == listed


@pytest.mark.parametrize("bad", [None, 5, iter([1])])
def test_what_is_no_list_of_prompts(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"prompts must be text.*or a list of those; given"):
        as_prompt_list(bad)


def test_all_forms_of_a_prompt() -> None:
    ids = TOKENIZER.encode("a fox")
    for prompt in ("a fox", {"prompt": "a fox"}):
        encoded = encode_prompt(prompt, TOKENIZER)
        assert (encoded.text, encoded.token_ids) == ("a fox", ids)
    for prompt in (ids, {"prompt_token_ids": ids}):
        encoded = encode_prompt(prompt, None)
        assert (encoded.text, encoded.token_ids) == (None, ids)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        5,
        {},
        {"prompt": 5},
        {"text": "a"},
        {"prompt_token_ids": "a"},
        {"prompt_token_ids": 5},
        {"prompt": "a", "prompt_token_ids": [1]},
    ],
)
def test_what_is_no_prompt(bad: Any) -> None:
    with pytest.raises(RequestError, match="a prompt must be text, a list of token ids"):
        encode_prompt(bad, TOKENIZER)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"multi_modal_data": {"image": object()}}, "image"),
        ({"multi_modal_data": {"video": [], "audio": []}}, "audio, video"),
        ({"multi_modal_data": None}, "multi_modal_data"),
        ({"images": []}, "images"),
        ({"pixel_values": 1}, "pixel_values"),
    ],
)
@pytest.mark.parametrize("text", [{"prompt": "a"}, {"prompt_token_ids": [1]}])
def test_input_that_is_not_text_is_refused_by_name(
    more: dict[str, Any], kind: str, text: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=f"^input of type {kind} is not supported.*text only"):
        encode_prompt({**text, **more}, TOKENIZER)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_chats_with_more_than_text_are_refused_by_name(kind: str) -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: "x"}]
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": parts}]
    with pytest.raises(RequestError, match=f"input of type {kind} is not supported"):
        render_chat(messages, TOKENIZER, chat_template=TEMPLATE)
    encoded = render_chat(
        [{"role": "user", "content": parts[:1]}],
        TOKENIZER,
        chat_template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
    )
    assert encoded.text == "what is this?"


def test_text_needs_a_tokenizer_and_some_text() -> None:
    with pytest.raises(RequestError, match="text prompt needs a tokenizer"):
        encode_prompt("a", None)
    for empty in ("", {"prompt": ""}):
        with pytest.raises(RequestError, match="the prompt is empty; to generate from nothing"):
            encode_prompt(empty, TOKENIZER)


def test_chat_templates() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match="no chat template"):
        render_chat(messages, TOKENIZER)
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        render_chat(messages, None)
    encoded = render_chat(messages, TOKENIZER, chat_template=TEMPLATE)
    assert encoded.text == "<user>hi\n<assistant>"
    assert TOKENIZER.decode(encoded.token_ids) == encoded.text
    begun = render_chat(messages, TOKENIZER, chat_template=TEMPLATE, add_generation_prompt=False)
    assert begun.text == "<user>hi\n"


def test_what_a_chat_template_refuses() -> None:
    refusing = "{{ raise_exception('only users may speak') }}"
    with pytest.raises(RequestError, match="template refused the messages: only users may speak"):
        render_chat([{"role": "cat", "content": "x"}], TOKENIZER, chat_template=refusing)


def test_one_conversation_or_many() -> None:
    one = [{"role": "user", "content": "hi"}]
    assert as_conversations(one) == [one]
    assert as_conversations([one, one]) == [one, one]
    for bad in ([], None, "hi", {"role": "user"}):
        with pytest.raises(RequestError, match="messages must be a list like"):
            as_conversations(bad)  # type: ignore[arg-type]


def test_bad_words_become_token_ids() -> None:
    tokenizer = byte_level()
    params = SamplingParams(bad_words=["ab"], bad_words_ids=[[1]])
    encoded = encode_bad_words(params, tokenizer)
    inside, word = (tokenizer.encode(t, add_special_tokens=False) for t in ("ab", " ab"))
    assert encoded.bad_words_ids == ((1,), tuple(inside), tuple(word))
    assert not encoded.bad_words
    unchanged = SamplingParams()
    assert encode_bad_words(unchanged, None) is unchanged
    with pytest.raises(RequestError, match="bad_words needs a tokenizer"):
        encode_bad_words(params, None)


def test_parts_of_text_are_one_text() -> None:
    tokenizer = byte_level()
    render = partial(render_chat, tokenizer=tokenizer, chat_template=TEMPLATE)
    parts = [{"type": "text", "text": "a fox"}, {"type": "text", "text": "a dog"}]
    one = render([{"role": "user", "content": parts}])
    assert one == render([{"role": "user", "content": "a fox\na dog"}])
    with pytest.raises(RequestError, match="parts of a message must be texts"):
        render([{"role": "user", "content": [{"type": "text"}]}])
