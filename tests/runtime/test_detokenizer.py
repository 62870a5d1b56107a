from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from inlay.runtime.detokenizer import (
    ByteDetokenizer,
    DetokenizerFactory,
    StopStringMatcher,
    WindowDetokenizer,
)
from inlay.runtime.token_bytes import BYTE_OF, token_bytes
from tests.runtime.toy_tokenizers import (
    TEXT,
    byte_fallback,
    byte_level,
    metaspace,
    word_ends,
    word_piece,
)

REPLACEMENT = "\ufffd"
BY_BYTES = [byte_level, byte_fallback, word_piece, metaspace]
"""Tokenizers whose tokens are so many bytes each."""


def stream(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], prompt: list[int] | None = None
) -> list[str]:
    """The pieces, one for each token, and one for what is held back at the end."""
    detokenizer = DetokenizerFactory(tokenizer).make(prompt or [], skip_special_tokens=True)
    return [*(detokenizer.append([i]) for i in ids), detokenizer.flush()]


def utf8_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token for each byte."""
    if tokenizer is byte_fallback():
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    name_of = {byte: name for name, byte in BYTE_OF.items()}
    return [tokenizer.convert_tokens_to_ids(name_of[byte]) for byte in data]


def raw_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """Of byte_fallback's tokens, by their names; the decoder strips one leading space."""
    data = b""
    for token in tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True):
        is_byte = token.startswith("<0x")
        data += bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
    return data.removeprefix(b" ")


@pytest.mark.parametrize("make", [byte_level, word_piece, metaspace])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ids_add_up_to_what_the_tokenizer_decodes(make, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """Random ids are mostly broken UTF-8: nothing is lost, doubled or reordered. Two of the ids
    lie beyond the vocabulary, as in models whose logits are padded."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream(tokenizer, ids)) == whole


@pytest.mark.parametrize("make", BY_BYTES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ids_continue_any_prompt(make, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """What follows a prompt reads as it does in the text of both, where that is whole text."""
    tokenizer = make()
    plain = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    some_ids = st.lists(st.sampled_from(plain), min_size=1, max_size=20)
    prompt, ids = data.draw(some_ids), data.draw(some_ids)
    decode = tokenizer.backend_tokenizer.decode
    before, whole = decode(prompt), decode(prompt + ids)
    if REPLACEMENT not in whole:
        assert "".join(stream(tokenizer, ids, prompt)) == whole[len(before) :]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(byte_fallback()) - 1), max_size=40))
def test_fallback_bytes_add_up_to_what_python_decodes(ids: list[int]) -> None:
    """tokenizers gives up a whole run of bytes for one that is no UTF-8: it may have been shown.
    Where a run is UTF-8, and most are not here, both agree."""
    tokenizer = byte_fallback()
    expected = raw_bytes(tokenizer, ids).decode(errors="replace")
    assert "".join(stream(tokenizer, ids)) == expected
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert REPLACEMENT in whole or whole == expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=24))
def test_any_bytes_add_up_to_what_python_decodes(data: bytes) -> None:
    ids = utf8_ids(byte_level(), data)
    assert "".join(stream(byte_level(), ids)) == data.decode(errors="replace")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab é你👍🏽\u200d\u0301\n"), max_size=12))
def test_valid_text_streams_in_whole_characters(make, text: str) -> None:  # type: ignore[no-untyped-def]
    """Every piece is whole characters, each at the moment its last byte comes."""
    tokenizer = make()
    data = text.encode()
    prompt = utf8_ids(tokenizer, b"x")
    pieces = stream(tokenizer, utf8_ids(tokenizer, data), prompt)
    expected = []
    for end in range(1, len(data) + 1):
        before, after = data[: end - 1].decode(errors="ignore"), data[:end].decode(errors="ignore")
        expected.append(after[len(before) :])
    assert pieces == [*expected, ""]


@pytest.mark.parametrize("text", TEXT)
def test_merged_tokens_stream_in_whole_characters(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > len(ids) / 2


def test_bytes_that_are_no_text_do_not_stop_the_stream() -> None:
    """DecodeStream would hold all of this back."""
    ids = utf8_ids(byte_level(), b"\xff" * 200)
    pieces = stream(byte_level(), ids)
    assert "".join(pieces) == REPLACEMENT * 200
    assert len("".join(pieces[:100])) > 90


def test_fallback_bytes_that_are_no_text_lose_nothing_else() -> None:
    tokenizer = byte_fallback()
    the = tokenizer.convert_tokens_to_ids("▁the")
    ids = [the, *utf8_ids(tokenizer, "é".encode() + b"\xff"), the, *utf8_ids(tokenizer, b"\xe4")]
    text = "".join(stream(tokenizer, ids, [the]))
    assert text.startswith(" theé")
    assert text.rstrip(REPLACEMENT).endswith(" the")
    assert text.endswith(REPLACEMENT)


def test_leading_spaces_continue_the_prompt() -> None:
    """The decoder strips the space of a text's first word; this is not the first."""
    tokenizer = byte_fallback()
    the, fox, a = tokenizer.convert_tokens_to_ids(["▁the", "▁fox", "a"])
    assert "".join(stream(tokenizer, [fox, the], [a])) == " fox the"
    assert "".join(stream(tokenizer, [fox, the])) == "fox the"


def test_special_tokens_have_no_text_and_cost_no_space() -> None:
    tokenizer = byte_fallback()
    the, fox, end = tokenizer.convert_tokens_to_ids(["▁the", "▁fox", "</s>"])
    assert "".join(stream(tokenizer, [the, end, end, fox], [the])) == " the fox"
    shown = DetokenizerFactory(tokenizer).make([the], skip_special_tokens=False)
    assert shown.append([the, end, fox]) == " the</s> fox"
    ids = byte_level().convert_tokens_to_ids(["a", "<eos>", "<tool>", "b", "<pad>"])
    assert "".join(stream(byte_level(), ids)) == "a<tool>b"


def test_a_prompt_cut_inside_a_character() -> None:
    prompt, ids = utf8_ids(byte_level(), b"a\xc3"), utf8_ids(byte_level(), b"\xa9b")
    assert "".join(stream(byte_level(), ids, prompt)) == byte_level().decode(ids)


def test_several_tokens_at_once() -> None:
    ids = byte_level().encode(TEXT[1])
    detokenizer = DetokenizerFactory(byte_level()).make([], skip_special_tokens=True)
    assert detokenizer.append(ids[:9]) + detokenizer.append(ids[9:]) == TEXT[1]
    assert detokenizer.append([]) == ""


@pytest.mark.parametrize("make", BY_BYTES)
def test_which_tokenizers_are_decoded_by_bytes(make) -> None:  # type: ignore[no-untyped-def]
    made = DetokenizerFactory(make()).make([], skip_special_tokens=True)
    assert isinstance(made, ByteDetokenizer)


def test_tokenizers_of_other_kinds_are_decoded_by_a_window() -> None:
    tokenizer = word_ends()
    made = DetokenizerFactory(tokenizer).make([], skip_special_tokens=True)
    assert isinstance(made, WindowDetokenizer)
    ids = tokenizer.convert_tokens_to_ids(["the</w>", "fo", "x", "fox</w>", "é</w>", "👍", "👍"])
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "the foxfox é 👍👍"


class Shouting(PreTrainedTokenizerFast):
    """A class that decodes in a way of its own."""

    def _decode(self, *args: object, **kwargs: object) -> str:
        return super()._decode(*args, **kwargs).upper()  # type: ignore[arg-type]


def test_a_class_with_a_way_of_its_own_is_decoded_by_a_window() -> None:
    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer)
    assert token_bytes(tokenizer) is None
    assert "".join(stream(tokenizer, tokenizer.encode(TEXT[1]))) == TEXT[1].upper()


@pytest.mark.parametrize("data", [b"\xff" * 200, "né你".encode() * 9 + b"\xe4\xb8"])
def test_a_window_loses_no_bytes(data: bytes) -> None:
    tokenizer = byte_level()
    window = WindowDetokenizer(tokenizer)
    pieces = [window.append([i]) for i in utf8_ids(tokenizer, data)]
    assert "".join(pieces) + window.flush() == data.decode(errors="replace")


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """Naive: read a character at a time; (end, begin, stop) of the first complete stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end, end - len(longest), longest
    return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_pieces(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    matcher = StopStringMatcher(stops, include)
    shown, found = "", False
    for piece in pieces:
        assert not found
        found = matcher.append(piece)
        visible = matcher.text[: len(matcher.text) - matcher.num_held]
        assert visible.startswith(shown), "text that was shown was taken back"
        shown = visible
        if found:
            break
    whole = "".join(pieces)
    expected = first_stop(whole, stops)
    assert found == (expected is not None)
    if expected is None:
        assert matcher.text == whole
        held = [
            n
            for n in range(len(whole) + 1)
            if any(whole.endswith(s[:n]) and n < len(s) for s in stops)
        ]
        assert matcher.num_held == max(held, default=0)
    else:
        end, begin, stop = expected
        assert matcher.text == shown == whole[: end if include else begin]
        assert matcher.stop_reason == stop


def test_nothing_is_held_without_stop_strings() -> None:
    matcher = StopStringMatcher(())
    assert not matcher.append("anything")
    assert (matcher.text, matcher.num_held) == ("anything", 0)


def test_what_is_skipped_holds_no_stop_string() -> None:
    matcher = StopStringMatcher(["ab"])
    matcher.skip("xaba")
    assert not matcher.append("bx"), "one that began before does not count either"
    assert matcher.append("yab")
    assert matcher.text == "xababxy"
