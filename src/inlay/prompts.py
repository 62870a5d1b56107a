"""The forms in which prompts may be given, and their way to token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from inlay.errors import RequestError
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

MEDIA = frozenset({"multi_modal_data", "images", "image", "pixel_values", "audio", "video"})
"""What a prompt may not hold: the names that other engines have for input that is not text."""

FORMS = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, not yet checked, and its text where text was given."""

    text: str | None
    token_ids: Sequence[int]


def as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list; a list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestError(f"prompts must be {FORMS}, or a list of those; given {prompts!r}")
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]
    return list(prompts)


def as_conversations(messages: Sequence[Any]) -> list[Sequence[Mapping[str, Any]]]:
    """One conversation or many, as a list; a list of mappings is one conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(
            'messages must be a list like [{"role": "user", "content": "..."}], or a list of such'
            f" lists, and not empty; given {messages!r}"
        )
    return [messages] if isinstance(messages[0], Mapping) else list(messages)


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> EncodedPrompt:
    """Token ids of a prompt in any form; RequestError where it has none of them."""
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        refuse_media(_media(prompt))
        if keys == {"prompt"} and isinstance(prompt["prompt"], str):
            prompt = prompt["prompt"]
        elif keys == {"prompt_token_ids"} and not isinstance(prompt["prompt_token_ids"], str):
            prompt = prompt["prompt_token_ids"]
        else:
            raise RequestError(f"a prompt must be {FORMS}; given {prompt!r}")
    if isinstance(prompt, str):
        return EncodedPrompt(prompt, _encode_text(prompt, tokenizer))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise RequestError(f"a prompt must be {FORMS}; given {prompt!r}")
    return EncodedPrompt(None, prompt)


def _media(prompt: Mapping[str, Any]) -> set[str]:
    """The types of what a prompt holds beside text: "image" rather than "multi_modal_data"."""
    parts = prompt.get("multi_modal_data")
    inner = set(map(str, parts)) if isinstance(parts, Mapping) else set()
    found = set(map(str, prompt)) & MEDIA
    return (found - {"multi_modal_data"}) | inner if inner else found


def refuse_media(given: Collection[str]) -> None:
    """Raises RequestError for anything but text."""
    if given:
        raise RequestError(
            f"input of type {', '.join(sorted(given))} is not supported: of a model for text and "
            "images the text tower is run; give text only"
        )


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    **template_options: Any,
) -> EncodedPrompt:
    """Messages through the tokenizer's chat template, ready for the model's answer."""
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer, and the engine has none: give LLM(tokenizer=)")
    if tokenizer.chat_template is None and "chat_template" not in template_options:
        raise RequestError(
            "the tokenizer has no chat template: set tokenizer.chat_template, pass chat_template=,"
            " or use generate() with a prompt written out"
        )
    is_list = isinstance(messages, list | tuple) and bool(messages)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            'messages must be a list like [{"role": "user", "content": "..."}], and not empty;'
            f" given {messages!r}"
        )
    messages, plain = list(messages), [_with_plain_content(one) for one in messages]
    options = {"add_generation_prompt": True, **template_options, "tokenize": False}
    try:
        text = None if plain == messages else _of_parts(messages, tokenizer, options)
        if text is None:
            text = tokenizer.apply_chat_template(plain, **options)
    except Exception as error:
        raise RequestError(f"the chat template refused the messages: {error}") from error
    check_unicode(text)
    # The template has written the special tokens already.
    return EncodedPrompt(text, tokenizer.encode(text, add_special_tokens=False))


def _of_parts(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> str | None:
    """Messages with lists of parts; None where the template knows texts only."""
    try:
        text = tokenizer.apply_chat_template(list(messages), **options)
    except Exception:
        return None
    # A template that puts content as it is into the text writes the list's brackets.
    lists = [one["content"] for one in messages if not isinstance(one.get("content"), str)]
    return None if any(str(parts) in text for parts in lists) else text


def _with_plain_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose content is one text; RequestError for media."""
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return message
    refuse_media({str(p.get("type", "text")) for p in parts if isinstance(p, Mapping)} - {"text"})
    given = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(parts):
        raise RequestError(
            'parts of a message must be texts or {"type": "text", "text": "..."}; given '
            f"{parts!r}"
        )
    return {**message, "content": "\n".join(texts)}


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if tokenizer is None:
        raise RequestError(
            "a text prompt needs a tokenizer, and the engine has none: give LLM(tokenizer=...),"
            " or a prompt of token ids"
        )
    if not text:
        raise RequestError(
            "the prompt is empty; to generate from nothing, give the token ids to begin with:"
            ' {"prompt_token_ids": [bos_token_id]}'
        )
    check_unicode(text)
    return tokenizer.encode(text)


def check_unicode(text: str) -> None:
    """RequestError for text with half a character in it, of which tokenizers crash."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is no valid Unicode: {text[error.start]!r} at position {error.start} is"
            " half a character, or a byte that was read as text; repair the text"
        ) from error


def encode_bad_words(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None
) -> SamplingParams:
    """bad_words as bad_words_ids: each as it is within a text and, after a space, as a word."""
    if not params.bad_words:
        return params
    if tokenizer is None:
        raise RequestError(
            "bad_words needs a tokenizer, and the engine has none: give LLM(tokenizer=...), or use"
            " bad_words_ids"
        )
    texts = [text for word in params.bad_words for text in (word, f" {word}")]
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    every = dict.fromkeys([*(params.bad_words_ids or ()), *ids])
    return replace(params, bad_words=None, bad_words_ids=tuple(every))
