"""Cost model of the published circuit extraction loop (jgcarrasco/circuit-extraction): what it computes per candidate.

One full forward pass of a hooked model, logits at every position, kept as a copy; then two KLs at the last position,
of the candidate and, again, of the current model. Left out, in its favour: the inputs and results of every head that
its hooks make the model write out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GPT2LMHeadModel


class PublishedExtraction:
    """Heads ascending, then the MLP, layers last to first; mean ablation, one mean per position.

    Args:
        patching, validation: token ids ``[B, S]``.
    """

    def __init__(self, model: GPT2LMHeadModel, patching: Tensor, validation: Tensor, threshold: float) -> None:
        self.model, self.validation, self.threshold = model, validation, threshold
        self.blocks: list[Any] = list(model.transformer.h)
        self.layers, self.heads = model.config.n_layer, model.config.n_head
        self.removed: list[tuple[int, int]] = []
        self.hooks: list[RemovableHandle] = []
        self.means: dict[nn.Module, Tensor] = {}
        self._record_means(patching)
        self.original = F.log_softmax(self._logits(), dim=-1)
        self.current = self._logits().clone()
        self.candidates = [(layer, n) for layer in reversed(range(self.layers)) for n in range(self.heads + 1)]

    @torch.no_grad()
    def step(self) -> bool:
        """Test the next candidate; returns whether it was removed."""
        candidate = self.candidates.pop(0)
        hook = self._ablate(*candidate)
        logits = self._logits().clone()
        removed = bool(self._kl(logits) - self._kl(self.current) < self.threshold)
        if removed:
            self.removed.append(candidate)
            self.hooks.append(hook)
            self.current = logits.clone()
        else:
            hook.remove()
        return removed

    def close(self) -> None:
        """Give the model back as it was."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        return self.model(self.validation, use_cache=False).logits

    def _kl(self, logits: Tensor) -> Tensor:
        log_probs = F.log_softmax(logits[:, -1], dim=-1)
        return F.kl_div(log_probs, self.original[:, -1], log_target=True, reduction="none").sum(-1).mean()

    @torch.no_grad()
    def _record_means(self, patching: Tensor) -> None:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.means[module] = inputs[0].mean(0)

        def note_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.means[module] = output.mean(0)

        hooks = [block.attn.c_proj.register_forward_pre_hook(note) for block in self.blocks]
        hooks += [block.mlp.register_forward_hook(note_output) for block in self.blocks]
        self.model(patching, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _ablate(self, layer: int, component: int) -> RemovableHandle:
        block = self.blocks[layer]
        if component == self.heads:
            return block.mlp.register_forward_hook(lambda module, inputs, output: self.means[module].expand_as(output))
        width = self.model.config.n_embd // self.heads
        part = slice(component * width, (component + 1) * width)

        def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            changed = inputs[0].clone()
            changed[..., part] = self.means[module][:, part]
            return (changed,)

        return block.attn.c_proj.register_forward_pre_hook(replace)
