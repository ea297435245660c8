"""The KL of pruned models that differ in one layer, computed from that layer's cached input upwards."""

import numpy as np
import torch
from torch import Tensor

from fastcircuit.extraction.ablation import check_finite
from fastcircuit.extraction.blocks import Heads, LayerConstants, PrunedBlock, Suffix, at_positions, output
from fastcircuit.extraction.prefix import Prefix, answer_log_probs
from fastcircuit.extraction.prompts import Rows, chunked
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Constants
from fastcircuit.tasks.task import Examples

PREFIX_BYTES = 2 * 2**30
# Rows of one batch of candidates beyond which a wider batch is no faster per candidate.
FULL_ROWS = {"cpu": 1024, "cuda": 32768}


class Evaluator:
    """Mean ``KL(original || pruned)`` at the answers of ``validation``, layer by layer from the last to the first.

    Args:
        budget: bytes for cached block inputs of the original model.
    """

    def __init__(
        self, model: MaskedCausalLM, constants: Constants, validation: Examples, budget: int = PREFIX_BYTES
    ) -> None:
        self.model, self.constants = model, constants
        self.prompts = list(chunked(model, validation))
        self.prefix = Prefix(model, constants, self.prompts, budget)
        answer_log_probs(self.prefix)
        for chunk in self.prompts:
            assert chunk.log_probs is not None
            check_finite(model, chunk.log_probs)
        self.layer = model.graph.num_layers
        self.evaluations = 0

    def enter(self, layer: int) -> None:
        """Turn to ``layer``: removals are now tested in it. Layers are entered from the last to the first."""
        self.layer = layer
        self._known: dict[tuple[bytes, bytes], float] = {}
        self._pruned: dict[bytes, PrunedBlock] = {}
        self._outputs: dict[tuple[int, bool], Tensor] = {}
        self._streams = self.prefix.inputs(layer)
        self._block = self.model.anatomy.blocks[layer]
        self._layer_constants = LayerConstants.of(self.constants, layer)
        everything = np.ones(self.model.graph.num_heads, dtype=bool)
        self._heads = Heads(self._block.attention, everything, self.model.anatomy.causal)

    def knows(self, suffix: Suffix, removed: np.ndarray) -> bool:
        return (suffix.key, removed.tobytes()) in self._known

    def kl(self, suffix: Suffix, removed: np.ndarray) -> float:
        """The KL in nats with ``removed`` ``[H + 1]`` (heads, then the MLP) taken from this layer below ``suffix``."""
        if not self.knows(suffix, removed):
            self.evaluate(suffix, [removed])
        return self._known[suffix.key, removed.tobytes()]

    @torch.no_grad()
    def evaluate(self, suffix: Suffix, trials: list[np.ndarray]) -> None:
        """Compute the KLs of several removals as one batch, for :meth:`kl` to find."""
        totals = torch.zeros(len(trials), dtype=torch.float64, device=self.model.device)
        for index, chunk in enumerate(self.prompts):
            totals += chunk.divergences(suffix(self._layer_output(index, suffix.rows(chunk), trials), chunk))
        self.evaluations += len(trials)
        for trial, value in zip(trials, totals.tolist(), strict=True):
            self._known[suffix.key, trial.tobytes()] = value

    def most_at_once(self, suffix: Suffix) -> int:
        """Candidates that a batch should hold at most."""
        rows = max(len(suffix.rows(chunk)) for chunk in self.prompts)
        return max(1, FULL_ROWS.get(self.model.device.type, FULL_ROWS["cpu"]) // rows)

    def grow(self, suffix: Suffix, removed: np.ndarray) -> Suffix:
        """``suffix`` with this layer, as it was decided, in front."""
        key = removed.tobytes()
        if key not in self._pruned:
            self._pruned[key] = PrunedBlock(self._block, self._layer_constants, removed, self.model.anatomy.causal)
        return suffix.below(self._pruned[key], removed.copy())

    def _layer_output(self, index: int, rows: Rows, trials: list[np.ndarray]) -> Tensor:
        """The stream behind this layer at ``rows`` for every trial, ``[C, n, d]``."""
        chunk, constants, attention = self.prompts[index], self._layer_constants, self._block.attention
        removed = torch.from_numpy(np.stack(trials)).to(self.model.device)
        heads = removed[:, None, :-1, None]
        mixed = torch.where(heads, at_positions(constants.heads, rows), self._original_heads(index, rows))
        after = rows.narrow(self._streams[index][None], chunk.every) + output(mixed, attention.out_weight)
        if attention.out_bias is not None:
            share = 1.0 if constants.has_output_bias else 1 - heads.to(after.dtype).mean(2)
            after = after + share * attention.out_bias
        return after + self._mlp(after, rows, trials)

    def _original_heads(self, index: int, rows: Rows) -> Tensor:
        """What this layer's heads compute in the original model, ``[1, n, H, d_head]``."""
        chunk = self.prompts[index]
        key = index, rows is chunk.every
        if key not in self._outputs:
            self._outputs[key] = self._heads(self._streams[index][None], chunk, rows)
        return self._outputs[key]

    def _mlp(self, stream: Tensor, rows: Rows, trials: list[np.ndarray]) -> Tensor:
        """What the MLP writes, or its constant where a trial removes it."""
        kept = [number for number, trial in enumerate(trials) if not trial[-1]]
        if len(kept) == len(trials):
            return self._block.mlp(self._block.mlp_norm(stream))
        written = at_positions(self._layer_constants.mlp, rows).expand_as(stream)
        if not kept:
            return written
        written = written.clone()
        written[kept] = self._block.mlp(self._block.mlp_norm(stream[kept]))
        return written
