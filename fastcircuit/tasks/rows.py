"""Rows of text to pairs of token ids, many at once: what the generated tasks share.

A row is a clean prompt, a corrupted one, and what follows: the right answer and a wrong one, each a single token. A
task draws its words from those that suit the tokenizer (:meth:`Encoder.single_tokens`), writes its rows, and hands them
to :meth:`Encoder.pairs`, which checks every one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.spans import Marked, encode
from fastcircuit.tasks.task import Examples, Pair

_PATIENCE = 1000  # rows drawn in a row that are not new, before a task is out of new ones


@dataclass(frozen=True)
class Row:
    """Two prompts, the right answer to the clean one and a wrong one; both begin with a space where there is one.

    ``where`` names the row in errors; without it the clean prompt does.
    """

    clean: str
    corrupted: str
    answer: str
    distractor: str
    where: str = ""


class Encoder:
    """A tokenizer as a task sees it.

    Args:
        tokenizer: a fast Hugging Face tokenizer. The special tokens it puts in front of a text by default are kept,
            those behind are dropped.
        task: names the task in errors.
        begin: put the beginning-of-text token in front also where the tokenizer does not by default.
    """

    def __init__(self, tokenizer: Any, task: str, begin: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"task {task}: {type(tokenizer).__name__} gives no character offsets; "
                "use a fast tokenizer (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.task = task
        probe = self._guarded(lambda: tokenizer("a", return_special_tokens_mask=True), "a")["special_tokens_mask"]
        self._behind = len(probe) - max((i + 1 for i, special in enumerate(probe) if not special), default=0)
        if not probe:
            raise InputError(
                f"task {task}: the tokenizer makes no token of 'a' (its vocabulary has {len(tokenizer)}); load the "
                "one of the model, from its directory"
            )
        self._front: list[int] = []
        bos = tokenizer.bos_token_id
        if begin and bos is not None and bos not in self(["a"])[0][:1]:
            self._front = [bos]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of every text."""
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        encoded = self._guarded(lambda: backend.encode_batch_fast(list(texts)), texts[0])
        return [[*self._front, *e.ids[: len(e.ids) - self._behind]] for e in encoded]

    def _guarded(self, call: Callable[[], Any], text: str) -> Any:
        try:
            return call()
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(
                f"task {self.task}: the tokenizer cannot encode its texts, such as {text!r}: {error}; use the "
                "tokenizer of another model"
            ) from error

    def lengths(self, words: Sequence[str], before: str = "to") -> dict[str, int]:
        """How many tokens each word takes after ``before`` and a space."""
        prefix = len(self([before])[0])
        ids = self([f"{before} {word}" for word in words])
        return {word: len(tokens) - prefix for word, tokens in zip(words, ids, strict=True)}

    def single_tokens(self, words: Sequence[str], at_least: int, what: str, before: str = "to") -> list[str]:
        """The words that are one token each after ``before`` and a space, known to the tokenizer.

        Raises:
            InputError: there are fewer than ``at_least``; names one that is split.
        """
        (prefix,) = self([before])
        unknown = self.tokenizer.unk_token_id
        fit = []
        split = ""
        for word, ids in zip(words, self([f"{before} {word}" for word in words]), strict=True):
            if ids[:-1] == prefix and ids[-1] != unknown:
                fit.append(word)
            elif not split:
                split = f"{word!r} takes {len(ids) - len(prefix)}" if ids[-1] != unknown else f"{word!r} is unknown"
        if len(fit) < at_least:
            raise InputError(
                f"task {self.task} needs {at_least} {what} that are a single token each; this tokenizer has "
                f"{len(fit)} of {len(words)} ({split}); use the tokenizer of a larger model"
            )
        return fit

    def pairs(self, rows: Sequence[Row], tokens: Mapping[str, int] | None = None) -> list[Pair]:
        """Tokenize and check the rows.

        Args:
            tokens: the token of every answer and distractor, where it is not the one that the tokenizer makes of it
                after the prompt.

        Raises:
            InputError: an answer that is not a single token, a prompt that changes when the answer follows it, prompts
                that differ in length or are longer than the model reads.
        """
        token = self._answer_tokens(rows) if tokens is None else tokens
        clean = self([row.clean + (row.answer if tokens is None else "") for row in rows])
        corrupted = self([row.corrupted for row in rows])
        longest = self.tokenizer.model_max_length
        pairs = []
        for row, right, wrong in zip(rows, clean, corrupted, strict=True):
            where = row.where or f"task {self.task}, {row.clean!r}"
            if tokens is None and right.pop() != token[row.answer]:
                raise InputError(f"{where}: the tokenizer merges the answer {row.answer!r} with the prompt")
            if len(right) > longest:
                raise InputError(f"{where}: {len(right)} tokens, and the model reads {longest}; use a larger model")
            pairs.append(
                Pair(
                    clean=tuple(right),
                    corrupted=tuple(wrong),
                    positions=(len(right) - 1,),
                    answers=(token[row.answer],),
                    distractors=(token[row.distractor],),
                    where=where,
                )
            )
        return pairs

    def _answer_tokens(self, rows: Sequence[Row]) -> dict[str, int]:
        """The token of every answer, read after a clean prompt of its, and distractor, after a corrupted one."""
        prompts = {row.distractor: row.corrupted for row in reversed(rows)}
        prompts.update({row.answer: row.clean for row in reversed(rows)})
        return {word: self.token(prompt, word) for word, prompt in prompts.items()}

    def token(self, prompt: str, word: str) -> int:
        """The one token that ``word`` is after ``prompt``; InputError names a word that is split."""
        text = prompt + word
        start = len(text) - len(word.lstrip(" "))
        encoded = encode(self.tokenizer, Marked(text, ((start, len(text)),)), f"task {self.task}, {prompt!r}")
        if len(encoded.answer(0)) != 1:
            raise InputError(
                f"task {self.task}: this tokenizer splits the answer {word.strip()!r} into {len(encoded.answer(0))} "
                f"tokens after {prompt!r}; it must be one, use another tokenizer"
            )
        return encoded.answer(0)[0]


def by_length(lengths: Mapping[str, int]) -> dict[int, list[str]]:
    """The words grouped by how many tokens they take."""
    groups: dict[int, list[str]] = defaultdict(list)
    for word, length in lengths.items():
        groups[length].append(word)
    return dict(groups)


def draw(task: str, sizes: Mapping[str, int], candidates: Callable[[str], Iterator[Row]]) -> dict[str, list[Row]]:
    """``sizes[split]`` rows of each split out of ``candidates(split)``, endless; a clean prompt occurs once in all.

    Raises:
        InputError: the candidates repeat themselves: there are not as many different prompts.
    """
    seen: set[str] = set()
    splits = {}
    for split, size in sizes.items():
        rows: list[Row] = []
        repeated = 0
        for row in candidates(split):
            repeated += 1
            if row.clean not in seen:
                seen.add(row.clean)
                rows.append(row)
                repeated = 0
            if len(rows) == size or repeated == _PATIENCE:
                break
        if len(rows) < size:
            raise InputError(
                f"task {task} has only about {len(rows)} different prompts for its {split} split with this tokenizer, "
                f"and {size} are wanted; ask for fewer with sizes"
            )
        splits[split] = rows
    return splits


def examples(
    encoder: Encoder, splits: Mapping[str, Sequence[Row]], tokens: Mapping[str, int] | None = None
) -> dict[str, Examples]:
    """The drawn rows of every split, tokenized (see :meth:`Encoder.pairs`)."""
    return {split: Examples.from_pairs(encoder.pairs(rows, tokens), name=split) for split, rows in splits.items()}
