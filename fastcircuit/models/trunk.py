"""The lower layers of a masked run, kept for runs that differ from it further up."""

from dataclasses import dataclass, replace

from torch import Tensor

from fastcircuit.models.active import Active


@dataclass
class Trunk:
    """What the lower layers of a masked run wrote, for runs of the same batch that differ from it further up.

    The first run that is given one fills it in; a run that is given ``trunk.up_to(layer)`` starts at that layer. Its
    masks may be on only where the first one's are, and below the layer they may differ only where nothing that is read
    from there on depends on it.

    Args:
        layer: where a run starts; None: this is to be filled in.
    """

    layer: int | None = None
    active: Active | None = None
    stream: Tensor | None = None
    bases: tuple[Tensor, ...] = ()

    def up_to(self, layer: int) -> "Trunk":
        """For a run whose masks differ at ``layer`` and above."""
        return replace(self, layer=min(layer, len(self.bases) - 1))
