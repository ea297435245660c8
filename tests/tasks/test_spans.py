"""<predict> spans: where they fall, what they ask for, and what is refused."""

import pytest

from fastcircuit.errors import InputError
from fastcircuit.tasks.spans import Marked, encode_pair

WHERE = "pairs.jsonl line 4"


def words(tokenizer, ids):
    return [tokenizer.decode([token]) for token in ids]


def pair(tokenizer, clean, corrupted, distractors=None):
    return encode_pair(tokenizer, clean, corrupted, WHERE, distractors)


def test_parse_takes_tags_out_and_trims_spaces():
    marked = Marked.parse("a <predict>b</predict> c<predict> d </predict>", WHERE)
    assert marked.text == "a b c d "
    assert [marked.text[start:end] for start, end in marked.spans] == ["b", "d"]


@pytest.mark.parametrize(
    "clean",
    ["The cat sat.<predict> He</predict>", "The cat sat. <predict>He</predict>", "The cat sat. <predict>He </predict>"],
)
@pytest.mark.parametrize("corrupted", ["The dog sat.", "The dog sat. ", "The dog sat.<predict> She</predict> ran."])
def test_space_may_stand_inside_or_before_the_tag(gpt2, clean, corrupted):
    found = pair(gpt2, clean, corrupted)
    assert found.clean == tuple(gpt2("The cat sat.").input_ids)
    assert found.corrupted == tuple(gpt2("The dog sat.").input_ids)
    assert found.positions == (len(found.clean) - 1,)
    assert words(gpt2, found.answers) == [" He"]
    assert words(gpt2, found.distractors) == [" She"] if "predict" in corrupted else found.distractors == (-100,)


def test_bos_is_added_as_the_tokenizer_does(stories):
    found = pair(stories, "Lily was sad.<predict> She</predict>", "Tim was sad.")
    assert found.clean == tuple(stories("Lily was sad.").input_ids)
    assert found.clean[0] == 1
    assert found.answers == (338,)


def test_span_in_the_middle_drops_what_comes_after(gpt2):
    found = pair(gpt2, "The cat <predict>saw</predict> the dog.", "The dog")
    assert words(gpt2, found.clean) == ["The", " cat"]
    assert words(gpt2, found.answers) == [" saw"]


def test_several_tokens_are_each_predicted_from_the_one_before(gpt2):
    clean = "One day, <predict>Wilhelmina</predict>."
    found = pair(gpt2, clean, "One night, <predict>Bartholomew</predict>.")
    full = gpt2("One day, Wilhelmina").input_ids
    start = len(gpt2("One day,").input_ids)
    assert found.answers == tuple(full[start:])
    assert len(found.answers) > 2
    assert found.positions == tuple(range(start - 1, len(full) - 1))
    assert found.clean == tuple(full[:-1])
    assert len(found.corrupted) == len(found.clean)


def test_corrupted_answer_of_another_length_is_no_distractor(gpt2):
    found = pair(gpt2, "One day, <predict>Wilhelmina</predict>.", "One night, <predict>Tim</predict>.")
    assert set(found.distractors) == {-100}
    answer = found.answers[:-1]
    assert found.corrupted == (*gpt2("One night,").input_ids, *answer)


def test_a_plain_corrupted_prompt_is_given_the_answer_to_read(gpt2):
    found = pair(gpt2, "One day, <predict>Wilhelmina</predict>.", "One night,")
    assert found.corrupted == (*gpt2("One night,").input_ids, *found.answers[:-1])


def test_shared_answer_tokens_are_no_distractors(gpt2):
    found = pair(gpt2, "We love <predict>New York</predict>", "We hate <predict>New Jersey</predict>")
    assert words(gpt2, found.answers) == [" New", " York"]
    assert found.distractors == (-100, *gpt2(" Jersey").input_ids)


def test_several_spans(gpt2):
    clean = "a <predict>cat</predict> and a <predict>dog</predict>"
    found = pair(gpt2, clean, "a <predict>dog</predict> or a <predict>cat</predict>")
    assert words(gpt2, found.answers) == [" cat", " dog"]
    assert words(gpt2, found.distractors) == [" dog", " cat"]
    assert found.positions == (0, 3)
    plain = pair(gpt2, clean, "a dog or a")
    assert plain.corrupted == found.corrupted
    assert plain.distractors == (-100, -100)


def test_explicit_distractors(gpt2):
    assert words(gpt2, pair(gpt2, "a cat.<predict> He</predict>", "a dog.", ("She",)).distractors) == [" She"]
    two = pair(gpt2, "a <predict>cat</predict> and a <predict>dog</predict>", "a dog or a", ("man", "boy"))
    assert words(gpt2, two.distractors) == [" man", " boy"]


def test_byte_fallback_answers(stories):
    found = pair(stories, "I see <predict>é日</predict>", "I see <predict>ñ本</predict>")
    assert stories.decode(found.answers) == "é日"
    assert len(found.answers) == 4


@pytest.mark.parametrize(
    ("clean", "corrupted", "distractors", "message"),
    [
        ("The cat", "The dog", None, 'line 4: "clean" has no <predict>'),
        ("The <predict></predict>", "The", None, "line 4: a <predict> span is empty"),
        ("The <predict>cat", "The", None, "line 4: <predict> and </predict> do not match up"),
        ("The cat</predict>", "The", None, "do not match up"),
        ("The <predict>a <predict>b</predict></predict>", "The", None, "do not match up"),
        ("The c<predict>at</predict>", "The d", None, "line 4: the answer 'at' cuts the token.* of ' cat'"),
        ("The <predict>ca</predict>t", "The", None, "line 4: the answer 'ca' cuts the token.* of ' cat'"),
        ("<predict>The</predict> cat", "A", None, "line 4: nothing stands before the answer 'The'"),
        ("The cat <predict>sat</predict>", "The dog too", None, "line 4: the clean prompt has 2 tokens .* one 3;"),
        ("A <predict>b</predict>", "A <predict>b</predict> <predict>c</predict>", None, "1 <predict> span.* and 2 in"),
        (
            "The <predict>cat</predict>",
            "A",
            ("Wilhelmina",),
            "line 4: .*'cat' has 1 token.*'Wilhelmina' [2-9]",
        ),
        ("The <predict>cat</predict>", "A", ("a", "b"), 'line 4: 2 "distractor" text.* for 1 <predict> span'),
        ("The <predict>cat</predict>", "A", (" ",), 'line 4: "distractor" is empty'),
    ],
)
def test_refused(gpt2, clean, corrupted, distractors, message):
    with pytest.raises(InputError, match=message) as caught:
        pair(gpt2, clean, corrupted, distractors)
    assert "\n" not in str(caught.value)


def test_unknown_characters_and_lengths_are_named(letters):
    with pytest.raises(InputError, match=r"line 4: the tokenizer cannot encode 'abC'"):
        pair(letters, "ab<predict>C</predict>", "xy")
    with pytest.raises(InputError, match="line 4: the prompt has 41 tokens and the model reads 32"):
        pair(letters, "a" * 40 + "<predict>b</predict>", "c" * 40)


def test_slow_tokenizers_are_refused():
    with pytest.raises(InputError, match="use a fast tokenizer"):
        pair(object(), "a <predict>b</predict>", "c")
