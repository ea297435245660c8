"""Text from tokens: what comes out piece by piece is the decoded whole."""

import random

import pytest

from fastcircuit import zoo
from fastcircuit.models.loading import load_tokenizer
from fastcircuit.serving.text import TextStream

TEXT = " a girl named Lily. She said: é 日本 “hello” 🙂 and went"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(zoo.path("stories260K")))


def pieces_of(tokenizer, text, stop=()):
    """What each token lets out, what the end does, and whether a stop string did it."""
    prompt = tokenizer("There was").input_ids
    ids = tokenizer("There was" + text).input_ids
    assert ids[: len(prompt)] == prompt
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in ids[len(prompt) :]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces, stream.finish(), stream.stopped


def test_pieces_make_the_text(tokenizer):
    pieces, rest, stopped = pieces_of(tokenizer, TEXT)
    assert "".join(pieces) == TEXT  # bytes of é, 日 and 🙂 are tokens of their own
    assert (rest, stopped) == ("", False)
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces


@pytest.mark.parametrize("stop", [" named", "Lily. Sh", "é 日", ".", "went"])
def test_stop_strings_cut(tokenizer, stop):
    pieces, rest, stopped = pieces_of(tokenizer, TEXT, ["not there", stop])
    assert "".join(pieces) + rest == TEXT[: TEXT.index(stop)]
    assert stopped


def test_the_first_stop_string_counts(tokenizer):
    pieces, _, _ = pieces_of(tokenizer, TEXT, ["Lily", "named", " named Li"])
    assert "".join(pieces) == " a girl "  # "named" is complete before " named Li" is
    pieces, _, _ = pieces_of(tokenizer, TEXT, ["med", "named"])
    assert "".join(pieces) == " a girl "


def test_what_only_looked_like_a_stop_string_comes_out(tokenizer):
    pieces, rest, stopped = pieces_of(tokenizer, TEXT, ["and went home"])
    assert "".join(pieces) == TEXT.removesuffix("and went")
    assert (rest, stopped) == ("and went", False)


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    prompt = tokenizer("There was").input_ids
    ids = tokenizer("There was 日").input_ids[len(prompt) :][:-1]
    stream = TextStream(tokenizer, prompt)
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    assert text == tokenizer.decode(prompt + ids, skip_special_tokens=True)[len("There was") :]
    assert "\ufffd" in text


def test_any_tokens_have_a_text(tokenizer):
    generator = random.Random(0)
    for _ in range(300):
        prompt, ids = ([generator.randrange(512) for _ in range(generator.randint(1, 9))] for _ in range(2))
        stream = TextStream(tokenizer, prompt)
        text = "".join(stream.push(token) for token in ids) + stream.finish()
        before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, prompt + ids))
        if "\ufffd" not in whole:  # bytes that make no character may take back what is out
            assert text == whole[len(before) :]
