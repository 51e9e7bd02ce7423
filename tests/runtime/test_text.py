"""Text piece by piece is the text as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.tiny import byte_tokenizer
from effk.runtime.text import TextStream

TOKENIZER = byte_tokenizer()  # a token per byte: every character beyond ASCII comes in parts


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_pieces_make_up_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in ids_of(text)]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)  # no character is given in parts
    assert "".join(pieces) == text.rstrip("\ufffd") or "\ufffd" in text
    assert stream.finish() == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 9), min_size=1))
def test_several_tokens_at_once_are_as_good_as_one_by_one(text: str, steps: list[int]) -> None:
    ids, stream, single = ids_of(text), TextStream(TOKENIZER), TextStream(TOKENIZER)
    seen = at = 0
    while at < len(ids):
        at += steps[seen % len(steps)]
        seen += 1
        stream.follow(ids[:at])
        assert text.startswith(stream.text) or "\ufffd" in text
        for token in ids[len(single._ids) : at]:
            single.add(token)
        # What waits is at most a character, of four bytes here; one by one the same or less.
        assert len(single.text.encode()) - len(stream.text.encode()) <= 4 or "\ufffd" in text
    assert stream.finish(ids) == text == single.finish()


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for count, token in enumerate(ids_of(text), 1):
        pieces.append(stream.add(token))
        assert stream.stopped == any(string in text[:count] for string in stop)
        if stream.stopped:
            break
    whole = stream.finish()
    found = [text.index(string) for string in stop if string in text]
    # A later string may begin before one that ends earlier: the text ends where the first to be complete begins.
    assert whole == text[: len(whole)] and stream.stopped == bool(found)
    assert whole.startswith("".join(pieces))
    assert not any(string in whole for string in stop) and (found or whole == text)


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    broken = [token for token in ids_of("\u20ac")[:1]] * 9  # a first byte of three, over and over
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in broken]
    assert len("".join(pieces)) >= 6
    assert stream.finish() == TOKENIZER.decode(broken)


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.add(token) for token in (*ids_of("a"), 0, *ids_of("b"))] == ["a", "", "b"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        TextStream(TOKENIZER, [""])
