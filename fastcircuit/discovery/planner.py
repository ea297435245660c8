"""How much memory a step will need, and with which micro-batches and recomputation it fits: known before it is run.

The step is run on meta tensors, which have shapes and no contents, and what it would hold at once is counted. So the
prediction follows whatever the model is made of.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastcircuit.discovery.buckets import Bucket
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.live_bytes import LiveBytes
from fastcircuit.discovery.settings import Settings
from fastcircuit.discovery.static_step import reasons_against
from fastcircuit.errors import RunError
from fastcircuit.evaluation.cache import Budgets, available_host_memory
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import LEAST_SHARED, shared_tokens
from fastcircuit.masks import Masks
from fastcircuit.models.changing import Changing
from fastcircuit.models.loading import quiet
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.mlp import Mlp, activation_name
from fastcircuit.models.packing import SHORT, FixedPacking
from fastcircuit.models.states import States
from fastcircuit.models.stream import recomputes_by_size
from fastcircuit.ops import triton
from fastcircuit.ops.backends import missing_reason
from fastcircuit.ops.mlp import pays
from fastcircuit.tasks.task import Examples

# Of the memory that is free, what a plan may fill: the rest is for workspaces and fragmentation.
SHARE = 0.9
# A micro-batch of this many tokens keeps a device as busy as a larger one.
ENOUGH_TOKENS = 1024
# The readers' inputs this many times over are more than a step holds, by far.
_SMALL = 16
_BUFFERS_PER_MASK = 9  # log-alpha, gradient, two moments, noise, sample, product and its gradient, clipped gradient


@dataclass(frozen=True)
class Plan:
    """How a run's steps are to be carried out, and the bytes they are predicted to need on the device.

    Args:
        micro_batch: examples at a time.
        recompute: whether blocks are computed again in the backward pass instead of being kept.
        tokens: packed tokens of the largest micro-batch.
        weights, cache, learned, step: bytes of the model, of cached states and distributions, of masks with their
            optimizer, and of one micro-batch, forward and backward.
        free: bytes that are free for all of that.
    """

    device: str
    micro_batch: int
    recompute: bool
    tokens: int
    weights: int
    cache: int
    learned: int
    step: int
    free: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.learned + self.step

    @property
    def fits(self) -> bool:
        """Whether it is predicted to fit, with a tenth of what is free to spare."""
        return self.total <= SHARE * self.free

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "fits": self.fits}


def plan(
    model: MaskedCausalLM,
    examples: Examples,
    settings: Settings,
    device: torch.device,
    answer_tokens: int | None = None,
    budgets: Budgets | None = None,
    free: int | None = None,
    execution: Execution | None = None,
) -> Plan:
    """The plan for a run on ``device``: whole batches with kept blocks if they fit, else what costs least time.

    That is: micro-batches of at least 1024 tokens with kept blocks; then recomputed blocks, with the largest
    micro-batch that fits; at last one example at a time, whether it fits or not.

    Args:
        model: on any device; on meta only its shapes are there, and its weights still have to find room.
        answer_tokens: how many tokens the distributions are restricted to; None: the vocabulary.
        free: bytes that can be allocated on the device; None: what it says.
        execution: with a micro-batch or recomputation that was said, nothing is chosen: what that needs is found.

    Raises:
        InputError: the execution's kind of step cannot be (see :meth:`Execution.choose_step`).
    """
    execution, budgets = execution or Execution(), budgets or Budgets.default(device)
    planner = _Planner(model, examples, settings, device, answer_tokens, budgets, free, execution)
    if execution.micro_batch is not None or execution.recompute is not None:
        return planner.as_said(execution)
    sizes = [settings.batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    kept = next((each for each in map(planner.keeping, sizes) if each.fits), None)
    if kept is not None and (kept.micro_batch == sizes[0] or kept.tokens >= ENOUGH_TOKENS):
        return kept
    recomputing = next((each for each in map(planner.recomputing, sizes) if each.fits), None)
    if recomputing is not None and (kept is None or recomputing.micro_batch > kept.micro_batch):
        return recomputing
    return kept or planner.recomputing(1)


def planned(
    model: MaskedCausalLM,
    examples: Examples,
    settings: Settings,
    execution: Execution,
    answer_tokens: int | None,
    on_note: Callable[[str], None] | None = None,
) -> Execution:
    """``execution`` with the micro-batch and recomputation that fit, unless one of them was said.

    A step that is small beside what a CPU has free is not planned: it takes longer than some steps.
    """
    if execution.micro_batch is not None or execution.recompute is not None or model.recompute is not None:
        return execution
    if model.device.type == "cpu":
        tokens = settings.batch_size * examples.input_ids.shape[1]
        reads = model.graph.num_readers * tokens * model.config.hidden_size * model.dtype.itemsize
        if _SMALL * reads < (available_host_memory() or math.inf):
            return execution
    found = plan(model, examples, settings, model.device, answer_tokens, execution=execution)
    if on_note is not None and found.micro_batch < settings.batch_size:
        on_note(f"memory: {found.micro_batch} of {settings.batch_size} examples at a time (--dry-run shows the plan)")
    return dataclasses.replace(execution, micro_batch=found.micro_batch, recompute=found.recompute)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device; RunError where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = available_host_memory()
    if not free:
        raise RunError("this system does not say how much memory is free (no /proc/meminfo); give --micro-batch")
    return free


class _Planner:
    def __init__(
        self,
        model: MaskedCausalLM,
        examples: Examples,
        settings: Settings,
        device: torch.device,
        answer_tokens: int | None,
        budgets: Budgets,
        free: int | None,
        execution: Execution,
    ) -> None:
        self.model, self.settings, self.device = meta_twin(model), settings, device
        self.lengths, _ = examples.attention_mask.sum(1).sort(descending=True)
        self.counts, _ = examples.answer_mask.sum(1).sort(descending=True)
        shared = shared_tokens(examples, settings.ablation == "interchange" and model.anatomy.causal)
        self.shares = bool((shared >= LEAST_SHARED * examples.attention_mask.sum(1)).all())
        self.changing, _ = (examples.attention_mask.sum(1) - shared).sort(descending=True)
        self.fixed = execution.choose_step(device, reasons_against(model, settings)) != "dynamic"
        self.vocabulary = answer_tokens or model.config.vocab_size
        loaded = model.device == device
        self.free = free_memory(device) if free is None else free
        self.weights = 0 if loaded else _bytes_of(model.model)
        self.cache = self._cache(budgets.device)
        masks = model.graph.num_edges + model.graph.num_writers
        self.learned = _BUFFERS_PER_MASK * masks * model.mask_dtype.itemsize

    def keeping(self, micro_batch: int) -> Plan:
        return self._plan(micro_batch, recompute=False)

    def recomputing(self, micro_batch: int) -> Plan:
        return self._plan(micro_batch, recompute=True)

    def as_said(self, execution: Execution) -> Plan:
        """The plan without a choice: a run does what was said, and decides by size what was not."""
        size = self.settings.batch_size
        return self._plan(min(execution.micro_batch or size, size), execution.recompute)

    def _plan(self, micro_batch: int, recompute: bool | None) -> Plan:
        bucket = largest_bucket(self.lengths, self.counts, micro_batch, self.fixed)
        changing = bucket.tokens if self.fixed or not self.shares else int(self.changing[: bucket.rows].sum())
        if recompute is None:
            read = changing * self.model.config.hidden_size * self.model.dtype.itemsize
            recompute = recomputes_by_size(self.model.graph, read)
        step = step_bytes(self.model, bucket, recompute, self.vocabulary, self.settings, self.device, changing)
        sizes = (self.weights, self.cache, self.learned, step, self.free)
        return Plan(str(self.device), micro_batch, recompute, bucket.tokens, *sizes)

    def _cache(self, budget: int) -> int:
        """Bytes of the reference cache: all examples, or the budget."""
        model = self.model
        rows = 0
        if self.settings.ablation == "interchange":
            rows = sum(part.shape[0] * part.shape[2] for part in _states(model, 1)) * model.dtype.itemsize
        answers = int(self.counts.sum()) * self.vocabulary * model.mask_dtype.itemsize
        return min(budget, int(self.lengths.sum()) * rows + answers)


def largest_bucket(lengths: Tensor, counts: Tensor, rows: int, fixed: bool) -> Bucket:
    """The shape of the largest micro-batch there can be; rounded up as the fixed step does, or as it is.

    Args:
        lengths, counts: tokens and answers of every example, the largest first.
    """
    rows = min(rows, len(lengths))
    tokens, answers, longest = int(lengths[:rows].sum()), int(counts[:rows].sum()), int(lengths[0])
    full = tokens == rows * longest
    bucket = Bucket(rows, longest, tokens, answers, full)
    return bucket.rounded() if fixed else bucket


def step_bytes(
    model: MaskedCausalLM,
    bucket: Bucket,
    recompute: bool,
    vocabulary: int,
    settings: Settings,
    device: torch.device,
    changing: int | None = None,
) -> int:
    """The most bytes that the gradient of one micro-batch holds at once, counted on the meta device.

    Args:
        model: on the meta device.
        device: where it is to run, which decides which attention does.
        changing: tokens that can differ from the ablated run; None: all.
    """
    meta = model.device
    _plan_mlps(model, device)
    model.fused = device.type == "cuda" and missing_reason("triton") is None
    with LiveBytes() as bytes_now:
        tokens, answers = bucket.tokens, bucket.answers
        numbers = bucket.split(torch.empty(bucket.size, dtype=torch.int64, device=meta))
        states = States(*_states(model, 1 if settings.ablation != "interchange" else tokens))
        log_probs = torch.empty(answers, vocabulary, dtype=model.mask_dtype, device=meta)
        mask = torch.empty(model.graph.num_edges, dtype=model.mask_dtype, device=meta, requires_grad=True)
        packing = _Planned(bucket, numbers, packed=bucket.longest <= SHORT and _attends_packed(model, device))
        ids = numbers["token_ids"]
        some = None
        if changing is not None and changing < tokens:
            places = torch.arange(tokens, device=meta)
            some = Changing(places[tokens - changing :], places[: tokens - changing])
        read = model.final_read(
            ids, packing, states, Masks(mask), numbers["answers"], recompute=recompute, changing=some
        )
        if model.fused:
            torch.autograd.grad(_FusedDivergence.apply(model.anatomy.final_norm(read), vocabulary).sum(), mask)
            return bytes_now.peak
        logits = model.unembed(read)
        if vocabulary != logits.shape[1]:
            logits = logits[:, :vocabulary].clone()
        own = torch.log_softmax(logits.to(model.mask_dtype), dim=-1)
        torch.autograd.grad(kl_divergence(log_probs, own).sum(), mask)
    return bytes_now.peak


def _attends_packed(model: MaskedCausalLM, device: torch.device) -> bool:
    """Whether a kernel attends within short sequences as they lie; otherwise they are laid out for torch's."""
    if device.type == "cpu":
        return True
    head_width = model.anatomy.blocks[0].attention.out_weight.shape[1]
    return bool(model.fused) and not triton.attention_reasons(model.dtype, head_width)


def meta_twin(model: MaskedCausalLM) -> MaskedCausalLM:
    """A model of the same shapes on the meta device: no weights are copied."""
    if model.device.type == "meta":
        return model
    with quiet(), torch.device("meta"):
        twin = type(model.model)(model.config).to(model.dtype)
    return MaskedCausalLM(twin, model.graph.embedding_nodes, backend="reference")


def _plan_mlps(model: MaskedCausalLM, device: torch.device) -> None:
    """Let MLPs that one call of ours is to run on ``device`` hold what it does."""
    anatomy = model.anatomy
    if device.type != "cpu" or missing_reason("cpu") is not None or model.dtype not in (torch.float32, torch.float64):
        return
    blocks = tuple(
        dataclasses.replace(block, mlp=_PlannedMlp(block.mlp.function, block.mlp.parts))
        if block.mlp.parts is not None and activation_name(block.mlp.parts.act) and pays(block.mlp.parts.up.weight)
        else block
        for block in anatomy.blocks
    )
    assert model._anatomy is not None
    model._anatomy = model._anatomy[0], dataclasses.replace(anatomy, blocks=blocks)


class _PlannedMlp(Mlp):
    """The memory of an MLP in one call: its result, and what backward needs."""

    def runs_by_hand(self, x: Tensor, backend: str = "auto") -> bool:
        return True

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        assert self.parts is not None
        products, hidden = 1 if self.parts.gate is None else 2, self.parts.up.weight.shape[1]
        return x.new_empty(x.shape), x.new_empty(products, len(x), hidden) if keep else None

    def backward(self, grad: Tensor, slopes: Tensor) -> Tensor:
        return grad.new_empty(grad.shape)


class _Planned(FixedPacking):
    """A packing whose attention holds what a fused kernel does: its operands, its result and a number per score row.

    Args:
        packed: the kernel reads packed tokens as they lie; otherwise sequences are laid out for it.
    """

    def __init__(self, bucket: Bucket, numbers: dict[str, Tensor], packed: bool) -> None:
        positions, pad, unpad = numbers["position_ids"], numbers["pad_index"], numbers["unpad_index"]
        super().__init__(bucket.longest, positions, pad, unpad, numbers["lengths"], bucket.full)
        self.packed = packed

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None
    ) -> Tensor:
        if self.packed:
            return _Fused.apply(query, key, value, True)
        operands = (self.to_sequences(part) for part in (query, key, value))
        return self.to_tokens(_Fused.apply(*operands, False))


class _Fused(torch.autograd.Function):
    """The memory of a fused attention kernel."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> Tensor:
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        out = query.new_empty(query.shape[1], query.shape[0] * query.shape[2]) if packed else torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _FusedDivergence(torch.autograd.Function):
    """The memory of answer_kl: no logits, but their gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, vocabulary: int) -> Tensor:
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(hidden)
        return hidden.new_empty(len(hidden))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (hidden,) = ctx.saved_tensors
        logits = hidden.new_empty(len(hidden), ctx.vocabulary)
        return logits.new_empty(hidden.shape), None


def _states(model: MaskedCausalLM, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty states of some tokens: embeddings, heads, MLPs."""
    anatomy, meta = model.anatomy, model.device
    ids = torch.zeros(1, dtype=torch.int64, device=meta)
    tables = len(anatomy.embed(ids, ids))
    heads, d_head, width = anatomy.blocks[0].attention.out_weight.shape
    empty: Callable[[int, int], Tensor] = lambda count, size: torch.empty(  # noqa: E731
        count, tokens, size, dtype=model.dtype, device=meta
    )
    layers = len(anatomy.blocks)
    return empty(tables, width), empty(layers, heads * d_head), empty(layers, width)


def _bytes_of(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors, tied ones once."""
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return sum(value.numel() * value.element_size() for value in tensors.values())
