"""What a task is: pairs of a clean and a corrupted prompt, the right and the wrong next tokens, in splits."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastcircuit.errors import InputError

NOTHING = -100  # where there is no answer or no distractor; the index cross_entropy ignores
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pair:
    """One clean prompt, its corrupted twin of the same length, and what should follow.

    Args:
        clean: token ids up to the last answer position.
        corrupted: token ids, as many.
        positions: where the logits predict an answer token, ascending.
        answers: the right next token at each of ``positions``.
        distractors: the wrong next token at each of ``positions``, ``NOTHING`` where there is none.
        where: names the pair in errors ("pairs.jsonl line 3").
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    positions: tuple[int, ...]
    answers: tuple[int, ...]
    distractors: tuple[int, ...]
    where: str = "pair"

    def check(self, vocab_size: int | None = None) -> None:
        """Raise :class:`InputError` with the one thing that is wrong with this pair."""
        if len(self.clean) != len(self.corrupted):
            raise InputError(
                f"{self.where}: the clean prompt has {len(self.clean)} tokens and the corrupted one "
                f"{len(self.corrupted)}; they must align, reword one of them"
            )
        if not self.positions:
            raise InputError(f"{self.where}: there is no answer to predict; give at least one answer position")
        if not len(self.positions) == len(self.answers) == len(self.distractors):
            raise InputError(
                f"{self.where}: {len(self.positions)} positions, {len(self.answers)} answers and "
                f"{len(self.distractors)} distractors; give one of each per position ({NOTHING} for no distractor)"
            )
        ascend = all(a < b for a, b in zip((-1, *self.positions), (*self.positions, len(self.clean)), strict=True))
        if not ascend:
            raise InputError(
                f"{self.where}: answer positions {list(self.positions)} must ascend within 0..{len(self.clean) - 1}"
            )
        real = [*self.clean, *self.corrupted, *self.answers, *(d for d in self.distractors if d != NOTHING)]
        check_ids(min(real), max(real), vocab_size, self.where)


def check_ids(lowest: int, highest: int, vocab_size: int | None, where: str) -> None:
    """Raise :class:`InputError` when a token id is not in ``0..vocab_size - 1``."""
    if lowest < 0:
        raise InputError(f"{where}: {lowest} is not a token id; ids start at 0")
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"{where}: token id {highest} is outside the vocabulary of {vocab_size} tokens; "
            "load the task with the model's own tokenizer"
        )


@dataclass(frozen=True)
class Examples:
    """One split: N pairs, right-padded to S tokens, on the CPU.

    Args:
        input_ids: ``[N, S]`` int64, 0 where padded.
        corrupted_input_ids: ``[N, S]`` int64, the same lengths row by row.
        attention_mask: ``[N, S]`` bool, False where padded.
        answer_mask: ``[N, S]`` bool, True where the logits predict an answer token.
        answers: ``[N, S]`` int64, the right next token where ``answer_mask``, -100 elsewhere.
        distractors: ``[N, S]`` int64, the wrong next token to compare with, -100 where there is none.
    """

    input_ids: Tensor
    corrupted_input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    answers: Tensor
    distractors: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def fingerprint(self) -> str:
        """A hash of everything the rows hold, 16 hexadecimal digits: the same for the same pairs in the same order."""
        digest = hashlib.sha256(str(list(self.input_ids.shape)).encode())
        for field in fields(self):
            digest.update(getattr(self, field.name).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], vocab_size: int | None = None, name: str = "split") -> "Examples":
        """Check, pad and stack pairs.

        Raises:
            InputError: no pairs (``name`` says of which split), or a pair that is wrong (its ``where`` says which).
        """
        if not pairs:
            raise InputError(f"{name} is empty; give it at least one pair")
        for pair in pairs:
            pair.check(vocab_size)
        width = max(len(pair.clean) for pair in pairs)
        ids, corrupted = (
            torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in column])
            for column in ([pair.clean for pair in pairs], [pair.corrupted for pair in pairs])
        )
        lengths = torch.tensor([len(pair.clean) for pair in pairs])
        attended = torch.arange(width) < lengths[:, None]
        row = torch.repeat_interleave(torch.tensor([len(pair.positions) for pair in pairs]))
        position, right, wrong = (
            torch.tensor([value for pair in pairs for value in getattr(pair, name)])
            for name in ("positions", "answers", "distractors")
        )
        asked = torch.zeros_like(attended)
        answers, distractors = torch.full((2, *ids.shape), NOTHING)
        asked[row, position] = True
        answers[row, position] = right
        distractors[row, position] = wrong
        return cls(ids, corrupted, attended, asked, answers, distractors)

    @classmethod
    def concat(cls, parts: Sequence["Examples"]) -> "Examples":
        """The rows of several splits under each other, padded to the widest."""
        if not parts:
            raise InputError("nothing to concatenate; give at least one split")
        width = max(part.input_ids.shape[1] for part in parts)
        columns = []
        for field in fields(cls):
            fill = NOTHING if field.name in ("answers", "distractors") else 0
            tensors = [getattr(part, field.name) for part in parts]
            columns.append(
                torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])
            )
        return cls(*columns)

    def both_directions(self) -> "Examples":
        """Every row, and below it the same with clean and corrupted prompts, answers and distractors exchanged."""
        exchanged = Examples(
            self.corrupted_input_ids,
            self.input_ids,
            self.attention_mask,
            self.answer_mask,
            self.distractors,
            self.answers,
        )
        columns = ((getattr(self, field.name), getattr(exchanged, field.name)) for field in fields(self))
        return Examples(*(torch.stack(pair, dim=1).flatten(0, 1) for pair in columns))

    def select(self, rows: slice | Sequence[int] | Tensor) -> "Examples":
        """The given rows, trimmed to the longest of them. No rows gives no rows (and no columns)."""
        if not isinstance(rows, slice | Tensor):
            rows = torch.tensor(list(rows), dtype=torch.int64)
        picked = [getattr(self, field.name)[rows] for field in fields(self)]
        attended = picked[2]
        width = int(attended.sum(1).max()) if attended.shape[0] else 0
        return Examples(*(column[:, :width].contiguous() for column in picked))


@dataclass(frozen=True)
class Task:
    """A behaviour to explain: examples in splits and how to score them.

    Args:
        name: what ``load_task`` knows it by.
        splits: "train", "validation", "test" (some files have fewer).
        answer_tokens: the answers among which KL and metrics compare; None compares over the full vocabulary.
        description: one sentence.
        ordered: the answer tokens have an order, and right are those after the distractor (numbers greater than the
            one in the prompt), wrong the distractor and those before it. See :meth:`right_answers`.
    """

    name: str
    splits: Mapping[str, Examples]
    answer_tokens: tuple[int, ...] | None
    description: str
    ordered: bool = False

    def right_answers(self, answers: Tensor, distractors: Tensor) -> Tensor:
        """Which of the A answer tokens are right, bool ``[N, A]``, of ``[N]`` answers and distractors.

        The answer alone, or in an ordered task every token after the distractor: then ``sum_A p (2 right - 1)`` is the
        probability difference of Hanna et al. 2023.

        Raises:
            InputError: the task has no answer tokens; compare over the full vocabulary instead.
        """
        if self.answer_tokens is None:
            raise InputError(f"task {self.name} names no answer tokens; its answers are right alone")
        tokens = torch.tensor(self.answer_tokens, device=answers.device)
        if not self.ordered:
            return answers[:, None] == tokens
        boundary = (distractors[:, None] == tokens).int().argmax(1)
        return torch.arange(len(tokens), device=answers.device) > boundary[:, None]

    def split(self, name: str) -> Examples:
        """The examples of one split.

        Raises:
            InputError: the task has no such split.
        """
        if name not in self.splits:
            raise InputError(f"task {self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise :class:`InputError` when a token of this task is outside a model's vocabulary."""
        for name, examples in self.splits.items():
            tokens = (examples.input_ids, examples.corrupted_input_ids, examples.answers, examples.distractors)
            highest = torch.stack(tokens).amax((0, 2))  # [N]
            row = int(highest.argmax())
            check_ids(0, int(highest[row]), vocab_size, f"task {self.name}, {name} pair {row + 1}")
