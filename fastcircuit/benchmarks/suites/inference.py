"""Submodels of a random GPT-2 beside the Hugging Face model: eager, sdpa and compiled, logits of the last position.

The bound of decoding is over a submodel that keeps everything: GPT-2's own matrices lie the other way around, and few
rows are multiplied with them a quarter to a third more slowly than with those of ``nn.Linear``, whatever is removed.
Prefill is one pass over the prompt; decoding is ``DECODED`` passes over one token each, with the others in the cache.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from fastcircuit.benchmarks.case import Case, Target, Variant, Work
from fastcircuit.benchmarks.gate import model_terms, problem
from fastcircuit.benchmarks.models import GPT2_SMALL, Shape, random_ids, random_model
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.submodel.modeling_circuit import CACHE
from fastcircuit.submodel.speed import DECODED, work_of

TOKENS = 16
CIRCUITS = {"2 heads, 12 MLPs": (2, 12), "9 heads, 5 MLPs": (9, 5), "2 heads, 3 MLPs": (2, 3)}
ANSWERS = (5, 9)


def cases(target: Target) -> Iterator[Case]:
    batches = (8,) if target.quick else (1, 32)
    chosen: list[tuple[str, tuple[int, ...] | None]] = [(name, None) for name in CIRCUITS]
    chosen.append(("2 heads, 3 MLPs", ANSWERS))
    for circuit, answers in chosen[2:] if target.quick else chosen:
        for batch in batches:
            shape = Shape(batch=batch, tokens=TOKENS)
            yield _case("prefill", circuit, answers, shape, target)
            if answers is None:
                yield _case("decode", circuit, None, shape, target)


def _case(phase: str, circuit: str, answers: tuple[int, ...] | None, shape: Shape, target: Target) -> Case:
    variants: dict[str, Callable[[Operands], Variant]] = {
        "fastcircuit": submodel,
        "sdpa": functools.partial(original, "sdpa"),
        "eager": functools.partial(original, "eager"),
    }
    if phase == "decode":
        variants["everything kept"] = whole
    elif not target.quick:
        variants["fastcircuit, compiled"] = functools.partial(submodel, compiled=True)
        variants["sdpa, compiled"] = functools.partial(original, "sdpa", compiled=True)
    logits = "" if answers is None else f", logits of {len(answers)} tokens"
    return Case(
        suite="inference",
        name=f"{phase}, {circuit}{logits}",
        shape=f"GPT-2 small, {shape.batch} x {shape.tokens}",
        dtype="float32",
        device=target.device,
        setup=functools.partial(Operands, phase, circuit, answers, shape, target.device),
        variants=variants,
        baseline="everything kept" if phase == "decode" else "sdpa",
        bound=Operands.bound,
        bounded=("fastcircuit",),
        counts_memory=not target.quick,
        no_memory=("fastcircuit, compiled", "sdpa, compiled", "everything kept"),  # the last makes weights of its own
        ours=("fastcircuit",),
    )


class Operands:
    """The model, its submodel, and prompts."""

    def __init__(self, phase: str, circuit: str, answers: Sequence[int] | None, shape: Shape, device: str) -> None:
        self.phase, self.shape, self.answers = phase, shape, answers
        self.model = random_model(shape, device)
        self.kept, constants = spread(GPT2_SMALL, *CIRCUITS[circuit])
        self.smaller = compile_submodel(
            self.model, self.kept, constants, answer_tokens=answers, last_position_only=answers is not None
        ).eval()
        self.smaller.to(device)
        self.ids = random_ids(shape).to(device)

    def logits(self, model: Any) -> Callable[[], Tensor]:
        """A call that gives logits ``[B, 1, V or A]``."""
        return torch.no_grad()(_decoding(model, self.ids) if self.phase == "decode" else _prefill(model, self.ids))

    def bound(self) -> float:
        """Of the work of both models (see :meth:`fastcircuit.submodel.speed.Work.ratio`)."""
        larger = self.whole if self.phase == "decode" else self.model
        full, smaller = (self.logits(model) for model in (larger, self.smaller))
        return work_of(lambda: full).ratio(work_of(lambda: smaller))

    @functools.cached_property
    def whole(self) -> Any:
        """A submodel that keeps everything."""
        _, constants = spread(GPT2_SMALL, 0, 0)
        kept = Kept(np.ones_like(self.kept.heads), np.ones_like(self.kept.mlps))
        return compile_submodel(self.model, kept, constants).eval().to(self.ids.device)

    @functools.cached_property
    @torch.no_grad()
    def ablated(self) -> Tensor:
        """The truth of the submodel: the model in float64, whose removed heads and MLPs write zero."""
        model = copy.deepcopy(self.model).double()
        width = self.shape.width // self.shape.heads
        for layer, block in enumerate(model.transformer.h):
            keep = torch.from_numpy(self.kept.heads[layer]).to(self.ids.device).repeat_interleave(width).double()
            block.attn.c_proj.register_forward_pre_hook(lambda module, inputs, keep=keep: (inputs[0] * keep,))
            if not self.kept.mlps[layer]:
                block.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        logits = _prefill(model, self.ids)()
        return logits if self.answers is None else logits[..., list(self.answers)]

    @functools.cached_property
    @torch.no_grad()
    def full(self) -> Tensor:
        """The truth of the model, in float64."""
        return _prefill(copy.deepcopy(self.model).double(), self.ids)()

    def check(self, result: Tensor, truth: Tensor) -> str | None:
        terms = model_terms(self.shape.layers, self.shape.width)
        return problem([(result, truth, float(truth.abs().max()))], terms, torch.float32)


def _prefill(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False).logits


def _decoding(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Decodes the last ``DECODED`` tokens and forgets them again."""
    cache = DynamicCache(config=model.config)
    prompt, steps = ids[:, :-DECODED], ids[:, -DECODED:].split(1, dim=1)
    with torch.no_grad():
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE: cache})

    def call() -> Tensor:
        for step in steps:
            logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
        cache.crop(-DECODED)
        return logits

    return call


def submodel(operands: Operands, compiled: bool = False) -> Variant:
    return _variant(operands, operands.smaller, compiled, lambda result: operands.check(result, operands.ablated))


def whole(operands: Operands) -> Variant:
    return _variant(operands, operands.whole, False, lambda result: operands.check(result, operands.full))


def original(attention: str, operands: Operands, compiled: bool = False) -> Variant:
    """The Hugging Face model with one of its attention implementations; the weights are shared."""
    model = copy.deepcopy(operands.model, {id(weight): weight for weight in operands.model.parameters()})
    model.set_attn_implementation(attention)
    return _variant(operands, model, compiled, lambda result: operands.check(result, operands.full))


def _variant(operands: Operands, model: Any, compiled: bool, check: Callable[[Tensor], str | None]) -> Variant:
    call = operands.logits(model)
    if compiled:
        torch.compiler.reset()  # of one function only a few variants are compiled, and the others run eagerly
        call = torch.compile(call, dynamic=False)
    return Variant(call, lambda: check(call()), work=least_work(model, operands.shape, operands.phase))


def least_work(model: Any, shape: Shape, phase: str) -> Work:
    """Of all passes: every matrix that is left read once, and multiplied with every token.

    The last block and the head are needed at one position alone; attention, norms and embeddings are left out.
    """
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    *earlier, last = [
        sum(part.weight.numel() for part in block.modules() if isinstance(part, (nn.Linear, Conv1D)))
        for block in blocks
    ]
    once = last + model.lm_head.weight.numel()
    passes, tokens = (DECODED, 1) if phase == "decode" else (1, shape.tokens)
    return Work(2 * passes * shape.batch * (tokens * sum(earlier) + once), 4 * (sum(earlier) + once))


def spread(shape: Shape, heads: int, mlps: int) -> tuple[Kept, Constants]:
    """So many heads and MLPs, spread over the layers; the rest writes zero."""
    layers, count, width = shape.layers, shape.heads, shape.width // shape.heads
    kept = Kept(np.zeros((layers, count), dtype=bool), np.zeros(layers, dtype=bool))
    for number in range(heads):
        kept.heads[layers // 2 + number % (layers // 2), number] = True
    kept.mlps[np.linspace(0, layers - 1, mlps).round().astype(int)] = True
    return kept, Constants(torch.zeros(layers, count, 1, width), torch.zeros(layers, 1, shape.width))
