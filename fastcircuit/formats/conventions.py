"""A circuit over one graph as a circuit over another graph of the same model.

Tools count the embeddings as two writers, as one, or not at all (always kept), and the keys and values of grouped-query
attention per group or per query head. A circuit means the same elsewhere only if it treats alike what the other graph
has as one; everything else is refused.
"""

import dataclasses

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph, Site


def to_graph(circuit: Circuit, graph: Graph) -> Circuit:
    """``circuit`` over ``graph``, which differs at most in ``embedding_nodes`` and ``num_kv_heads``.

    - to ``joint`` from ``split``: where both embeddings are kept or neither is;
    - to ``split`` from ``joint``: both, where the one is kept;
    - to ``none``: when every embedding edge is kept; from ``none``: all of them are;
    - to fewer key/value heads: where a reader keeps what the others of its group keep; to more: the same for each.

    Raises:
        InputError: a graph of another model, or a circuit it cannot express; names the first edge in the way.
    """
    own = circuit.graph
    if own == graph:
        return circuit
    if (own.num_layers, own.num_heads) != (graph.num_layers, graph.num_heads):
        raise InputError(f"it is over {own}; this model has {graph}; name the model it was found in")
    blocks = []
    for site, there in zip(own.sites, graph.sites, strict=True):
        block = _embeddings(site.view(circuit.keep), own, graph, site)
        blocks.append(_heads(block, own, graph, site, there).reshape(-1))
    return dataclasses.replace(circuit, graph=graph, keep=np.concatenate(blocks))


def _embeddings(block: np.ndarray, own: Graph, graph: Graph, site: Site) -> np.ndarray:
    """A site's ``[R, w]`` flags with the embedding columns of ``graph``."""
    have, want = own.num_embedding_writers, graph.num_embedding_writers
    embedding, rest = block[:, :have], block[:, have:]
    if have == want:
        return block
    if have and not want and not embedding.all():
        row, column = np.argwhere(~embedding)[0]
        raise InputError(
            f"it removes {own.writers[column]} -> {own.readers[site.first_reader + row]}, and over embedding nodes "
            "'none' embeddings are always kept; it cannot be taken there"
        )
    if want == 1 and have == 2 and (embedding[:, 0] != embedding[:, 1]).any():
        row = int((embedding[:, 0] != embedding[:, 1]).argmax())
        raise InputError(
            f"it keeps one of {own.writers[0]} and {own.writers[1]} -> {own.readers[site.first_reader + row]}, which "
            "embedding nodes 'joint' have as one edge; it cannot be taken there"
        )
    column = embedding[:, :1] if have else np.ones((len(block), 1), dtype=bool)
    return np.concatenate([np.repeat(column, want, axis=1), rest], axis=1)


def _heads(block: np.ndarray, own: Graph, graph: Graph, site: Site, there: Site) -> np.ndarray:
    """A site's flags with the key and value readers of ``graph``."""
    if site.num_readers == there.num_readers:
        return block
    have, want = own.num_kv_heads, graph.num_kv_heads
    queries, keys_values = block[: own.num_heads], block[own.num_heads :].reshape(2, have, -1)
    if want > have:
        keys_values = np.repeat(keys_values, want // have, axis=1)
    else:
        groups = keys_values.reshape(2, want, have // want, -1)
        differ = (groups != groups[:, :, :1]).any(axis=(1, 2, 3))
        if differ.any():
            kind = int(differ.argmax())
            _, group = np.argwhere((groups != groups[:, :, :1]).any(axis=(2, 3)))[0]
            raise InputError(
                f"in layer {site.layer} it keeps different edges into the {('key', 'value')[kind]} inputs of the heads "
                f"that share key/value head {group} in this model; it cannot be taken there"
            )
        keys_values = groups[:, :, 0]
    return np.concatenate([queries, keys_values.reshape(2 * want, -1)])
