"""Text with ``<predict>`` spans to token ids: which tokens are asked for, and where.

    "One day, Lily was sad.<predict> She</predict> cried."

asks for the token " She" after the full stop. A span may sit anywhere, hold several tokens (each is predicted from the
position before it), and there may be several spans. It must begin and end where tokens do.
"""

import re
from dataclasses import dataclass
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.task import NOTHING, Pair

OPEN, CLOSE = "<predict>", "</predict>"
_SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


@dataclass(frozen=True)
class Marked:
    """A text without its tags: ``spans`` are the ``[start, end)`` characters that stood in tags."""

    text: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, source: str, where: str) -> "Marked":
        """Take the tags out of ``source``. Spaces at the edges of a span do not belong to it."""
        text, spans, read = "", [], 0
        for match in _SPAN.finditer(source):
            text += source[read : match.start()]
            inside = match[1]
            if not inside.strip(" "):
                raise InputError(f"{where}: a {OPEN} span is empty; put the answer between the tags")
            start = len(text) + len(inside) - len(inside.lstrip(" "))
            spans.append((start, start + len(inside.strip(" "))))
            text += inside
            read = match.end()
        text += source[read:]
        if OPEN in text or CLOSE in text:
            raise InputError(f"{where}: {OPEN} and {CLOSE} do not match up; close every span before the next")
        return cls(text, tuple(spans))

    def replace_last(self, prompt: str) -> "Marked":
        """The last span, and the space in front of it, after another prompt."""
        start, end = self.spans[-1]
        gap = " " if self.text[:start].endswith(" ") else ""
        start_there = len(prompt.rstrip(" ") + gap)
        return Marked(prompt.rstrip(" ") + gap + self.text[start:end], ((start_there, start_there + end - start),))


@dataclass(frozen=True)
class Encoded:
    """Token ids of a marked text and, for each span, the ``[start, end)`` tokens it covers."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def answer(self, index: int) -> tuple[int, ...]:
        start, end = self.spans[index]
        return self.ids[start:end]


def encode(tokenizer: Any, marked: Marked, where: str) -> Encoded:
    """Tokenize as the tokenizer does by default (special tokens added) and place the spans on tokens.

    Raises:
        InputError: not a fast tokenizer, a character it does not know, or a span that cuts a token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{where}: {type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (tokenizer.json)"
        )
    try:
        encoding = tokenizer(marked.text, return_offsets_mapping=True, return_special_tokens_mask=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"{where}: the tokenizer cannot encode {marked.text!r}: {error}; reword it, or use another model"
        ) from error
    special = encoding["special_tokens_mask"]
    offsets = [None if s else tuple(o) for o, s in zip(encoding["offset_mapping"], special, strict=True)]
    ids = tuple(encoding["input_ids"])
    spans = tuple(_tokens_of(marked.text, span, offsets, where) for span in marked.spans)
    for start, end in spans:
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids[start:end]:
            raise InputError(f"{where}: an answer is unknown to the tokenizer; choose answers it has tokens for")
    return Encoded(ids, spans)


def _tokens_of(text: str, span: tuple[int, int], offsets: list[tuple[int, int] | None], where: str) -> tuple[int, int]:
    """The ``[start, end)`` tokens that cover the characters of ``span`` and, but for spaces in front, nothing else."""
    start, end = span
    covering = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > start]
    word = text[start:end]
    if not covering:
        raise InputError(f"{where}: the tokenizer drops the answer {word!r}; choose another")
    first, last = offsets[covering[0]], offsets[covering[-1]]
    assert first is not None
    assert last is not None
    if text[first[0] : start].strip(" ") or text[end : last[1]].strip(" "):
        cut = text[first[0] : max(end, last[1])]
        raise InputError(
            f"{where}: the answer {word!r} cuts the token(s) of {cut!r}; move the {OPEN} tags to where tokens end"
        )
    if covering[0] == 0:
        raise InputError(f"{where}: nothing stands before the answer {word!r}, so nothing can predict it; add a prompt")
    return covering[0], covering[-1] + 1


def encode_pair(
    tokenizer: Any, clean: str, corrupted: str, where: str, distractors: tuple[str, ...] | None = None
) -> Pair:
    """A clean text with spans and its corrupted twin, as a :class:`Pair`.

    ``corrupted`` has its own spans, whose answers then are the distractors (where they have as many tokens), or none:
    then it is the prompt before the last answer. Tokens after the last answer position are dropped.

    Args:
        distractors: the wrong answer for each span, in place of the corrupted text's.

    Raises:
        InputError: see :func:`encode`; no span; prompts that differ in their number of tokens.
    """
    marked = Marked.parse(clean, where)
    if not marked.spans:
        raise InputError(f'{where}: "clean" has no {OPEN}...{CLOSE} span; mark the answer')
    right = encode(tokenizer, marked, where)
    wrong, own_answers = _encode_corrupted(tokenizer, marked, right, corrupted, where)
    positions: list[int] = []
    answers: list[int] = []
    against: list[int] = []
    for index, (start, end) in enumerate(right.spans):
        positions += range(start - 1, end - 1)
        answers += right.answer(index)
        if distractors is not None:
            against += _encode_distractor(tokenizer, marked, right, index, distractors, where)
        elif own_answers and len(wrong.answer(index)) == end - start:
            against += wrong.answer(index)
        else:
            against += [NOTHING] * (end - start)
    start, end = right.spans[-1]
    if end - 1 > tokenizer.model_max_length:
        raise InputError(
            f"{where}: the prompt has {end - 1} tokens and the model reads {tokenizer.model_max_length}; shorten it"
        )
    forced = wrong.answer(-1) if len(wrong.answer(-1)) == end - start else right.answer(-1)
    return Pair(
        clean=right.ids[: end - 1],
        corrupted=wrong.ids[:start] + forced[:-1],
        positions=tuple(positions),
        answers=tuple(answers),
        distractors=tuple(d if d != a else NOTHING for d, a in zip(against, answers, strict=True)),
        where=where,
    )


def _encode_corrupted(
    tokenizer: Any, clean: Marked, right: Encoded, corrupted: str, where: str
) -> tuple[Encoded, bool]:
    """The corrupted text, its spans aligned with the clean ones, and whether it brought spans of its own."""
    marked = Marked.parse(corrupted, where)
    own_answers = bool(marked.spans)
    if own_answers and len(marked.spans) != len(clean.spans):
        raise InputError(
            f"{where}: {len(clean.spans)} {OPEN} span(s) in the clean text and {len(marked.spans)} in the corrupted; "
            "give as many, or none in the corrupted"
        )
    wrong = encode(tokenizer, marked if own_answers else clean.replace_last(marked.text), where)
    expected = right.spans if own_answers else right.spans[-1:]
    for (start, _), (start_there, _) in zip(expected, wrong.spans, strict=True):
        if start != start_there:
            raise InputError(
                f"{where}: the clean prompt has {start} tokens before the answer and the corrupted one {start_there}; "
                "they must align, reword one of them"
            )
    return wrong, own_answers


def _encode_distractor(
    tokenizer: Any, clean: Marked, right: Encoded, index: int, distractors: tuple[str, ...], where: str
) -> tuple[int, ...]:
    """The tokens of one distractor, read in the place of the answer."""
    if len(distractors) != len(clean.spans):
        raise InputError(
            f'{where}: {len(distractors)} "distractor" text(s) for {len(clean.spans)} {OPEN} span(s); give one for each'
        )
    start, end = clean.spans[index]
    word = distractors[index].strip(" ")
    if not word:
        raise InputError(f'{where}: "distractor" is empty; give a wrong answer or leave it out')
    there = encode(tokenizer, Marked(clean.text[:start] + word, ((start, start + len(word)),)), where)
    expected = right.spans[index]
    if there.spans[0] != expected:
        counts = [last - first for first, last in (expected, there.spans[0])]
        raise InputError(
            f"{where}: the answer {clean.text[start:end]!r} has {counts[0]} token(s) and the distractor {word!r} "
            f"{counts[1]}; they must have as many"
        )
    return there.answer(0)
