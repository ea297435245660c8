"""How much two circuits have in common."""

from typing import Any

from fastcircuit.circuit import Circuit


def overlap(first: Circuit, second: Circuit) -> dict[str, Any]:
    """Edges and writers in common, in absolute numbers, as fractions, and against chance.

    ``expected_by_chance`` is the mean size of the intersection of two random circuits of these sizes,
    ``|A| |B| / |edges|``; ``ratio_to_chance`` is the intersection over it (None for an empty circuit).
    """
    common = (first & second).num_edges
    chance = first.num_edges * second.num_edges / first.graph.num_edges
    smaller, either = min(first.num_edges, second.num_edges), (first | second).num_edges
    return {
        "first": first.num_edges,
        "second": second.num_edges,
        "total_edges": first.graph.num_edges,
        "intersection": common,
        "union": either,
        "only_first": first.num_edges - common,
        "only_second": second.num_edges - common,
        "jaccard": common / either if either else None,
        "fraction_of_smaller": common / smaller if smaller else None,
        "expected_by_chance": chance,
        "ratio_to_chance": common / chance if chance else None,
        "common_writers": sorted(set(first.nodes) & set(second.nodes), key=first.graph.writer_id),
    }
