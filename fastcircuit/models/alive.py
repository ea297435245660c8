"""What has to be computed when many masks are exactly 0, as the device alone knows it: shapes stay, programs end early.

A head or MLP that no mask other than 0 reads is not alive: nothing reads its row of the stream, so that row, what its
readers see and the gradients of that may hold anything. Its reads and its attention are left out, and its products
where that pays (see :func:`fastcircuit.ops.live_product.pays`); other products, and what is done number by number, are
torch's and work on whatever is there. What leads to such components alone is found before, by
:func:`fastcircuit.masks.without_dead_ends`.
"""

from collections.abc import Sequence

from torch import Tensor

from fastcircuit.graph import Graph, Site
from fastcircuit.masks import alive
from fastcircuit.ops import live_writers


class Alive:
    """The live writers and readers of one masked run, as flags on its device.

    Args:
        mask: of every edge, ``[num_edges]``.
        backend: which kernels to use.
    """

    def __init__(self, graph: Graph, mask: Tensor, backend: str) -> None:
        self.graph, self.backend = graph, backend
        self._writers, self._readers = (flags.int() for flags in alive(graph, mask))

    def heads(self, layer: int) -> Tensor:
        """int32 ``[num_heads]``, 1 for live heads of a layer."""
        return self._writers[self.graph.head_writer(layer) : self.graph.mlp_writer(layer)]

    def readers(self, site: Site, more: int = 0) -> Tensor:
        """int32, 1 for live readers of a site and of ``more`` readers after those."""
        return self._readers[site.first_reader : site.first_reader + site.num_readers + more]

    def lists(self, weights: Sequence[Tensor], readers: Tensor) -> list[Tensor]:
        """What the readers with these masks read, block of readers by block (see :func:`live_writers`)."""
        flags = readers.split([len(block) for block in weights])
        return [live_writers(block, own, backend=self.backend) for block, own in zip(weights, flags, strict=True)]
