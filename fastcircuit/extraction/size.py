"""How large a pruned model is, in parameters other than embeddings."""

from dataclasses import dataclass

import numpy as np

from fastcircuit.errors import InputError
from fastcircuit.models.anatomy import Projection
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Kept


@dataclass(frozen=True)
class Sizes:
    """Parameters of every component.

    Counted are the weights and biases of the heads (query and output; key and value as long as any head of their
    group is kept) and of the MLPs, the attention's output biases, and the constants that stand for what was removed
    (one vector per block and position, which takes up the output bias). Not counted are embeddings, unembedding and
    norms, which pruning leaves alone.

    Args:
        heads: parameters of one head's query and output, ``[L]``.
        kv_heads: of one key/value head, ``[L]``.
        mlps: ``[L]``.
        biases: of the attention's output bias, ``[L]``.
        num_heads, num_kv_heads: of one layer.
        constant: numbers in one block's constant, 0 under zero ablation.
    """

    heads: np.ndarray
    kv_heads: np.ndarray
    mlps: np.ndarray
    biases: np.ndarray
    num_heads: int
    num_kv_heads: int
    constant: int

    @classmethod
    def of(cls, model: MaskedCausalLM, constant: int) -> "Sizes":
        """The sizes of ``model``; InputError when its MLPs cannot be told apart."""
        mlps = [module for name, module in model.model.named_modules() if name.endswith(".mlp")]
        graph = model.graph
        if len(mlps) != graph.num_layers:
            raise InputError(f"found {len(mlps)} MLP modules in {graph.num_layers} layers; cannot count parameters")
        attentions = [block.attention for block in model.anatomy.blocks]
        return cls(
            heads=np.array([_numbers(a.query) + a.out_weight[0].numel() for a in attentions]),
            kv_heads=np.array([_numbers(a.key) + _numbers(a.value) for a in attentions]),
            mlps=np.array([sum(parameter.numel() for parameter in mlp.parameters()) for mlp in mlps]),
            biases=np.array([0 if a.out_bias is None else a.out_bias.numel() for a in attentions]),
            num_heads=graph.num_heads,
            num_kv_heads=graph.num_kv_heads,
            constant=constant,
        )

    @property
    def total(self) -> int:
        """Parameters of all components."""
        return int((self.heads * self.num_heads + self.kv_heads * self.num_kv_heads + self.mlps + self.biases).sum())

    def parameters(self, kept: Kept) -> int:
        """Parameters of the kept components and of the constants for the others."""
        groups = kept.heads.reshape(len(kept.heads), self.num_kv_heads, -1).any(2)
        weights = self.heads * kept.heads.sum(1) + self.kv_heads * groups.sum(1) + self.mlps * kept.mlps
        cut = ~(kept.heads.all(1) & kept.mlps)
        return int((weights + np.maximum(self.biases, self.constant * cut)).sum())

    def fraction(self, kept: Kept) -> float:
        """What remains of :attr:`total`."""
        return self.parameters(kept) / self.total


def _numbers(projection: Projection) -> int:
    """Parameters of one head of a projection."""
    return projection.weight[0].numel() + (0 if projection.bias is None else projection.bias[0].numel())
