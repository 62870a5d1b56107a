from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from inlay.runtime.detokenizer import Detokenizer, StopStringMatcher, special_token_ids
from tests.runtime.toy_tokenizers import TEXT, byte_fallback, byte_level

BYTE_IDS = [byte_level().convert_tokens_to_ids(chr(c)) for c in range(0xA1, 0xAD)]
REPLACEMENT = "\ufffd"


def stream(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], prompt: list[int] | None = None
) -> list[str]:
    """The pieces, one for each token, and one for what is held back at the end."""
    detokenizer = Detokenizer(tokenizer, prompt or [], special_token_ids(tokenizer))
    return [*(detokenizer.append([i]) for i in ids), detokenizer.flush()]


def utf8_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token for each byte."""
    if tokenizer is byte_fallback():
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    names = tokenizer.backend_tokenizer.decoder, byte_names()
    return [tokenizer.convert_tokens_to_ids(names[1][byte]) for byte in data]


def byte_names() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
    return [names[byte] for byte in range(256)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(byte_level()) - 1), max_size=40))
def test_any_ids_add_up_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    """Random ids are mostly broken UTF-8: nothing is lost, doubled or reordered."""
    tokenizer = byte_level()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids)) == whole


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
    shown = Detokenizer(tokenizer, [the])
    assert shown.append([the, end, fox]) == " the</s> fox"
    ids = byte_level().convert_tokens_to_ids(["a", "<eos>", "<tool>", "b", "<pad>"])
    assert "".join(stream(byte_level(), ids)) == "a<tool>b"


def test_a_prompt_cut_inside_a_character() -> None:
    prompt, ids = utf8_ids(byte_level(), b"a\xc3"), utf8_ids(byte_level(), b"\xa9b")
    assert "".join(stream(byte_level(), ids, prompt)) == byte_level().decode(ids)


def test_several_tokens_at_once() -> None:
    ids = byte_level().encode(TEXT[1])
    detokenizer = Detokenizer(byte_level())
    assert detokenizer.append(ids[:9]) + detokenizer.append(ids[9:]) == TEXT[1]
    assert detokenizer.append([]) == ""


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
