"""Re-grouped heads: every kept query with its own key/value head, equal groups, no smaller choice."""

import itertools

import pytest

from fastcircuit.submodel.grouping import Grouping, group_heads


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_every_choice_of_heads(group):
    for kept in _subsets(12):
        grouping = group_heads(kept, group)
        size, rest = divmod(len(grouping.queries), len(grouping.kv))
        assert rest == 0
        assert [head for head in grouping.queries if head is not None] == list(kept)
        for place, head in enumerate(grouping.queries):
            assert head is None or grouping.kv[place // size] == head // group
        assert len(grouping.queries) + len(grouping.kv) == _smallest(kept, group)


def test_examples():
    assert group_heads([0, 1, 6, 7], 4) == Grouping((0, 1, 6, 7), (0, 1))  # two of each: nothing to add
    assert group_heads([0, 1, 2, 4, 5], 4) == Grouping((0, 1, 2, 4, 5, None), (0, 1))  # one query filled up
    assert group_heads([0, 1, 2, 3, 4], 4) == Grouping((0, 1, 2, 3, 4, None), (0, 0, 1))  # one key/value repeated
    assert group_heads([5], 4) == Grouping((5,), (1,))  # the other key/value head is gone


def _subsets(heads):
    for count in (1, 2, 3, 5, 7, 11, 12):
        yield from itertools.islice(itertools.combinations(range(heads), count), 0, None, 5)


def _smallest(kept, group):
    """Heads and key/value heads together, by trying all sizes on the counts."""
    counts = [sum(head // group == kv for head in kept) for kv in {head // group for head in kept}]
    return min(sum(-(-count // size) for count in counts) * (size + 1) for size in range(1, 13))
