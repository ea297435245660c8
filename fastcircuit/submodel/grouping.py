"""Grouped-query attention with some heads gone: which heads to compute so that every group has the same size."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grouping:
    """Heads of the new attention, in consecutive groups of equal size that share one key/value head.

    Args:
        queries: original query head of each new head; None: a head that writes nothing, filling up its group.
        kv: original key/value head of each group (the same one may serve several groups).
    """

    queries: tuple[int | None, ...]
    kv: tuple[int, ...]


def group_heads(kept: Sequence[int], group: int) -> Grouping:
    """The smallest attention that computes the ``kept`` query heads exactly.

    Attention functions want ``heads = kv_heads * size`` with the same size in every group. A key/value head none of
    whose queries is kept goes. Where the others keep different numbers ``c_j`` of queries, each is cut into
    ``ceil(c_j / size)`` groups: its key and value projections are repeated, and the last of its groups is filled up
    with queries that write nothing. A query head has as many weights as a key/value head, so the size is taken that
    minimises ``kv_heads * (size + 1)``; the larger one when two are equal, because it caches less.

    Args:
        kept: query heads, ascending.
        group: query heads per key/value head in the original model.
    """
    members: dict[int, list[int]] = {}
    for head in kept:
        members.setdefault(head // group, []).append(head)

    def groups(size: int) -> int:
        return sum(-(-len(heads) // size) for heads in members.values())

    largest = max(len(heads) for heads in members.values())
    size = min(range(largest, 0, -1), key=lambda size: groups(size) * (size + 1))
    queries: list[int | None] = []
    kv: list[int] = []
    for kv_head, heads in members.items():
        for start in range(0, len(heads), size):
            chunk = heads[start : start + size]
            queries += [*chunk, *[None] * (size - len(chunk))]
            kv.append(kv_head)
    return Grouping(tuple(queries), tuple(kv))
