"""The original model below the candidate: the input of every block, kept as far as memory allows."""

import numpy as np
import torch
from torch import Tensor

from fastcircuit.extraction.blocks import LayerConstants, PrunedBlock
from fastcircuit.extraction.prompts import Prompts
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Constants

Streams = list[Tensor]  # one [T, d] per chunk of prompts


class Prefix:
    """Inputs of the unpruned model's blocks, asked for from the last to the first.

    As many as fit in ``budget`` bytes are kept (at least one), evenly spread; the others are computed again from the
    nearest one below.
    """

    def __init__(self, model: MaskedCausalLM, constants: Constants, prompts: list[Prompts], budget: int) -> None:
        self.model, self.constants, self.prompts = model, constants, prompts
        tokens = sum(chunk.packing.num_tokens for chunk in prompts)
        fitting = budget // (tokens * model.config.hidden_size * model.dtype.itemsize)
        self.capacity = min(max(1, fitting), model.graph.num_layers + 1)
        self._kept: dict[int, Streams] = {}

    def inputs(self, layer: int) -> Streams:
        """The streams in front of block ``layer``; what lies above it is dropped."""
        self._kept = {index: streams for index, streams in self._kept.items() if index <= layer}
        if layer not in self._kept:
            self._fill(layer)
        return self._kept[layer]

    def _fill(self, layer: int) -> None:
        """Run from the highest kept stream, or the embeddings, up to ``layer``; keep what there is room for."""
        start = max(self._kept, default=0)
        streams = self._kept.get(start) or [chunk.embed() for chunk in self.prompts]
        room = max(1, self.capacity - len(self._kept))
        keep = {layer - round(step * (layer - start) / room) for step in range(room)}
        for index in range(start, layer + 1):
            if index > start:
                streams = self._run(index - 1, streams)
            if index in keep:
                self._kept[index] = streams

    def _run(self, layer: int, streams: Streams) -> Streams:
        block = original_block(self.model, self.constants, layer)
        return [
            block(stream[None], chunk, chunk.every, chunk.every)[0]
            for stream, chunk in zip(streams, self.prompts, strict=True)
        ]


def original_block(model: MaskedCausalLM, constants: Constants, layer: int) -> PrunedBlock:
    """Block ``layer`` with everything kept."""
    anatomy = model.anatomy
    nothing = np.zeros(model.graph.num_heads + 1, dtype=bool)
    return PrunedBlock(anatomy.blocks[layer], LayerConstants.of(constants, layer), nothing, anatomy.causal)


@torch.no_grad()
def answer_log_probs(prefix: Prefix) -> None:
    """Store the original model's log-probabilities with every chunk of prompts."""
    streams = prefix.inputs(prefix.model.graph.num_layers)
    for chunk, stream in zip(prefix.prompts, streams, strict=True):
        chunk.log_probs = chunk.predict(chunk.answers.narrow(stream[None], chunk.every))[0]
        chunk.probs = chunk.log_probs.exp()
