"""What has to be computed when many masks are exactly 0.

A writer that no live reader reads contributes nothing and receives nothing: its row, its head's readers and attention,
its MLP are left out, and no result changes. The gradient of a mask that a hard-concrete clamp holds at 0 is 0, so the
out-edges of such a writer lose nothing either.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from fastcircuit.graph import Graph, Site


class Active:
    """The live writers and readers of one masked run, as indices.

    Args:
        on: bool ``[num_edges]``, the edges whose mask is not exactly 0; None: everything is computed.
    """

    def __init__(self, graph: Graph, on: np.ndarray | None, device: torch.device) -> None:
        self.graph, self.device = graph, device
        everything = np.ones(graph.num_writers, dtype=bool), np.ones(graph.num_readers, dtype=bool)
        writers, readers = everything if on is None else graph.live(on)
        self.everything = bool(writers.all() and readers.all())
        self._writers, self._readers = writers, readers
        self._before = np.concatenate([[0], np.cumsum(writers)]).tolist()
        self._weights: dict[str, Tensor] = {}
        self._indices: dict[tuple[int, int, bool], Tensor] = {}

    def for_other_masks(self) -> "Active":
        """The same writers and readers, of a run with other masks."""
        other = copy.copy(self)
        other._weights = {}
        return other

    @property
    def num_writers(self) -> int:
        """Rows of the compact stream."""
        return self._before[-1]

    def row(self, writer: int) -> int:
        """Row of a live writer in the compact stream; for any writer, how many live ones come before it."""
        return self._before[writer]

    def is_live(self, writer: int) -> bool:
        return bool(self._writers[writer])

    @property
    def writers(self) -> Tensor:
        """Live writers, ``[num_writers]``."""
        return self._index(0, len(self._writers), self._writers)

    def heads(self, layer: int) -> Tensor:
        """Live heads of a layer, ``[n]``."""
        return self._index(self.graph.head_writer(layer), self.graph.mlp_writer(layer), self._writers)

    def reader_rows(self, site: Site) -> Tensor:
        """Live readers of a site, counted within it, ``[n]``."""
        return self._index(site.first_reader, site.first_reader + site.num_readers, self._readers)

    def weights(self, site: Site, mask: Tensor) -> Tensor:
        """The live block ``[live readers, live writers]`` of the run's mask at a site; a view when all is live."""
        if site.name not in self._weights:
            block = site.view(mask)
            if not self.everything:
                columns = self.writers[: self.row(site.num_writers)]
                block = block.index_select(0, self.reader_rows(site)).index_select(1, columns)
            self._weights[site.name] = block
        return self._weights[site.name]

    def num_attention_readers(self, layer: int) -> int:
        """Live readers of a layer's heads."""
        site = self.graph.attention_site(layer)
        return int(self._readers[site.first_reader : site.first_reader + site.num_readers].sum())

    def layer_weights(self, layer: int, mask: Tensor) -> Tensor:
        """What a layer reads of the layers below: the heads' live readers, then its MLP if it is live."""
        key = f"layer {layer}"
        if key not in self._weights:
            parts = [self.weights(self.graph.attention_site(layer), mask)]
            if self.is_live(self.graph.mlp_writer(layer)):
                parts.append(self.weights(self.graph.mlp_site(layer), mask)[:, : parts[0].shape[1]])
            self._weights[key] = torch.cat(parts)
        return self._weights[key]

    def mlp_head_weights(self, layer: int, mask: Tensor) -> Tensor:
        """What a layer's MLP reads of its live heads, ``[1, n]``."""
        return self.weights(self.graph.mlp_site(layer), mask)[:, self.row(self.graph.head_writer(layer)) :]

    def store_layer(self, layer: int, grad_mask: Tensor, grad: Tensor, of_heads: Tensor | None) -> None:
        """Put the gradients of ``layer_weights`` and ``mlp_head_weights`` (None: no live heads) where they belong."""
        readers = self.num_attention_readers(layer)
        if readers:
            self.store(self.graph.attention_site(layer), grad_mask, grad[:readers])
        if len(grad) > readers:
            of_mlp = grad[readers:] if of_heads is None else torch.cat([grad[readers:], of_heads], dim=1)
            self.store(self.graph.mlp_site(layer), grad_mask, of_mlp)

    def store(self, site: Site, grad_mask: Tensor, grad: Tensor) -> None:
        """Put a live block's gradient where it belongs."""
        block = site.view(grad_mask)
        if self.everything:
            block.copy_(grad)
        else:
            block[self.reader_rows(site)[:, None], self.writers[: self.row(site.num_writers)]] = grad

    def _index(self, first: int, last: int, flags: np.ndarray) -> Tensor:
        """Set flags among ``first`` to ``last``, counted from ``first``; kept, since every site asks more than once."""
        key = (first, last, flags is self._writers)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(np.flatnonzero(flags[first:last])).to(self.device)
        return self._indices[key]
