"""One optimisation step as functions of buffers: fixed shapes, and not a number asked of the device.

Every tensor that differs between steps (noise of the masks, batch, schedules, multipliers, optimizer state, history)
lives in a buffer that stays where it is, so that a GPU can replay a recording of the step. On the CPU the same
functions run as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.discovery.buckets import Bucket
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.settings import Settings
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks, without_dead_ends
from fastcircuit.models.masked import MaskedCausalLM


def reasons_against(model: MaskedCausalLM, settings: Settings) -> list[str]:
    """Why the static step cannot stand for the dynamic one; empty if it can."""
    reasons = []
    if settings.upstream_compat:
        reasons.append("upstream_compat follows the published code step by step")
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    if kinds & {"dynamic", "longrope"}:
        reasons.append("its rotary positions depend on the longest prompt of a batch")
    return reasons


@dataclass(frozen=True)
class Inputs:
    """Buffers of one micro-batch on the model's device.

    Args:
        numbers: what :meth:`Bucket.fill` lays out, int64 ``[bucket.size]``.
        rows: ablated states of the packed tokens, ``[T, F]``; None: the same for every token.
        log_probs: the full model's distributions at the answers, ``[N, V]``.
    """

    bucket: Bucket
    numbers: Tensor
    rows: Tensor | None
    log_probs: Tensor

    @classmethod
    def empty(cls, bucket: Bucket, reference: Reference) -> "Inputs":
        """Buffers for a bucket, to be filled (see :class:`fastcircuit.discovery.feeder.Feeder`)."""
        rows, log_probs = reference.cache.empty(bucket.tokens, bucket.answers)
        numbers = torch.zeros(bucket.size, dtype=torch.int64, device=reference.model.device)
        return cls(bucket, numbers, rows, log_probs)


class StaticStep:
    """``begin``, then ``accumulate`` for every micro-batch, then ``finish``.

    Args:
        reference: the training examples.
        parameters: what is learned; updated in place.
        optimizer: of :meth:`MaskParameters.optimizer`, ``on_device``.
        recompute: as in :class:`MaskedCausalLM`; None: the model's own.
    """

    def __init__(
        self,
        reference: Reference,
        parameters: MaskParameters,
        optimizer: torch.optim.Optimizer,
        recompute: bool | None = None,
    ) -> None:
        self.reference, self.model, self.parameters = reference, reference.model, parameters
        self.settings, self.optimizer, self.recompute = parameters.settings, optimizer, recompute
        edge, steps = parameters.edge.detach(), self.settings.steps
        size = len(edge) + len(parameters.node)
        self.drawn = edge.new_full((size,), 0.5) if parameters.backend is None else parameters.draw(0)
        self.product, self.gradient, self.kl = torch.ones_like(edge), torch.zeros_like(edge), edge.new_zeros(())
        self.rates = parameters.rates()
        targets = [parameters.targets(step) for step in range(steps)]
        self.targets = torch.tensor(targets, dtype=torch.float64).to(edge.device)
        self.step = torch.zeros(1, dtype=torch.int64, device=edge.device)
        self.history = torch.zeros(steps, 5, dtype=torch.float64, device=edge.device)

    def draw(self, generator: torch.Generator) -> None:
        """New noise for the masks, if it comes from the host's generator."""
        if self.parameters.backend is None:
            self.parameters.draw_uniform_(self.drawn, generator)

    @torch.no_grad()
    def begin(self) -> None:
        """Sample the masks."""
        if self.parameters.backend is not None:
            self.drawn[1:].copy_(self.step)
        self.start(self.parameters.sample(self.drawn).product(self.model.graph))

    @torch.no_grad()
    def start(self, product: Tensor) -> None:
        """Take these masks of every edge, ``[num_edges]``; nothing has been accumulated at them."""
        compiled = self.parameters.backend is not None
        self.product.copy_(without_dead_ends(self.model.graph, product) if compiled else product)
        self.gradient.zero_()
        self.kl.zero_()

    def accumulate(self, inputs: Inputs) -> None:
        """Add a micro-batch's share of the KL, and its gradient by the mask of every edge."""
        parts = inputs.bucket.split(inputs.numbers)
        mask = self.product.detach().requires_grad_()
        read = self.model.final_read(
            parts["token_ids"],
            inputs.bucket.packing(parts),
            self.reference.states(inputs.rows),
            Masks(mask),
            parts["answers"],
            skip_zeros=True,
            recompute=self.recompute,
            on_device=True,
        )
        divergence = self.reference.divergence(read, inputs.log_probs)
        share = (divergence * parts["weights"].to(divergence.dtype)).sum()
        (gradient,) = torch.autograd.grad(share, mask)
        self.gradient.add_(gradient)
        self.kl.add_(share.detach())

    def finish(self) -> None:
        """The Lagrangian, the update of everything that is learned, and the step's row of the history."""
        parameters, settings = self.parameters, self.settings
        masks, targets = parameters.sample(self.drawn), self.targets.index_select(0, self.step)[0]
        edge_target, node_target = targets.to(self.kl.dtype)
        penalty, sparsity = parameters.penalty(masks, edge_target, node_target)
        learned = [value for value in parameters.parameters() if value.requires_grad]
        outputs = [masks.product(self.model.graph), penalty]
        gradients = torch.autograd.grad(outputs, learned, [self.gradient, torch.ones_like(penalty)], allow_unused=True)
        for value, gradient in zip(learned, gradients, strict=True):
            value.grad = gradient
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(learned, settings.clip_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates.index_select(1, self.step), strict=True):
            group["lr"].copy_(rate[0])
        self.optimizer.step()
        values = (self.kl, penalty.detach(), sparsity.detach())
        row = torch.stack([self.step[0].double(), *(value.double() for value in values), targets[0]])
        self.history.index_copy_(0, self.step, row[None])
        self.step.add_(1)
