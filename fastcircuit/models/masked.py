"""MaskedCausalLM: a Hugging Face decoder whose every edge can be masked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

from fastcircuit.errors import InputError
from fastcircuit.graph import EmbeddingNodes, Graph
from fastcircuit.masks import Masks
from fastcircuit.models.anatomy import Anatomy
from fastcircuit.models.changing import Changing
from fastcircuit.models.gpt2 import gpt2
from fastcircuit.models.llama import llama
from fastcircuit.models.mistral import mistral
from fastcircuit.models.modeling_tracr import TracrConfig
from fastcircuit.models.packing import Packing
from fastcircuit.models.qwen2 import qwen2
from fastcircuit.models.states import States, run_unmasked
from fastcircuit.models.stream import MaskedRun
from fastcircuit.models.tracr import tracr
from fastcircuit.models.trunk import Trunk

ARCHITECTURES: dict[str, Callable[[Any], Anatomy]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    TracrConfig.model_type: tracr,
}


@dataclass
class MaskedCausalLMOutput(ModelOutput):
    """Logits of a masked run: ``[B, S, V]``; ``[B, P, V]`` at int positions; ``[N, V]`` at a mask of positions."""

    logits: Tensor | None = None


class MaskedCausalLM(nn.Module):
    """A Hugging Face causal language model with a mask on every edge; shares the model's weights, copies nothing.

    Every reader sees ``x_r = sum_j [z_rj y_j + (1 - z_rj) y~_j]`` (Edge Pruning, equation 3). With all masks 1 the
    logits are the Hugging Face model's; with all masks 0 they are the ablated run's. Weights are frozen: gradients
    flow to masks only.

    Args:
        model: a GPT-2, Llama, Mistral or Qwen2 ``...ForCausalLM``, or a ``TracrLMHeadModel``; put in eval mode, its
            parameters frozen.
        embedding_nodes: ``split``, ``joint`` or ``none`` (see :class:`fastcircuit.graph.Graph`).
        recompute: recompute each block in the backward pass (less memory) instead of keeping its activations (faster);
            None: keep them while they are estimated to take at most a GiB.
        backend: which kernels to use: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Raises:
        InputError: a model of another kind: another architecture, one without its head, a wrapper around one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        embedding_nodes: EmbeddingNodes = "split",
        recompute: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_model(model)
        self.model = model.eval().requires_grad_(False)
        self.graph = Graph.from_config(model.config, embedding_nodes)
        self.recompute = recompute
        self.backend = backend
        self.fused: bool | None = None  # as in MaskedRun
        self.gated: bool | None = None  # as in MaskedRun
        self.name: str | None = model.config.name_or_path or None
        self._anatomy: tuple[tuple[int, torch.device, torch.dtype], Anatomy] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        embedding_nodes: EmbeddingNodes = "split",
        recompute: bool | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> "MaskedCausalLM":
        """Load a Hugging Face id, a local directory or a zoo name; ``kwargs`` go to ``AutoModelForCausalLM``.

        Raises:
            InputError: no such model, an unsupported architecture, weights that are missing or not finite.
        """
        from fastcircuit.models.loading import read_model

        masked = cls(read_model(name, **kwargs), embedding_nodes, recompute, backend)
        masked.name = name
        return masked

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model, as views of its current weights (new ones when the weights have moved)."""
        place = next(self.model.parameters()).data_ptr(), self.device, self.dtype
        if self._anatomy is None or self._anatomy[0] != place:
            self._anatomy = place, ARCHITECTURES[self.config.model_type](self.model)
        return self._anatomy[1]

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the model in a circuit file."""
        config = self.config
        return {
            "name": self.name,
            "architecture": config.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[States, Tensor, Packing]:
        """The unmasked model: what every writer wrote (over T packed tokens), and the final stream ``[T, d]``."""
        packing, token_ids = self._pack(input_ids, attention_mask)
        states, stream = run_unmasked(self.anatomy, token_ids, packing, self.backend)
        return states, stream, packing

    def unembed(self, stream: Tensor) -> Tensor:
        """Final norm and unembedding: ``[N, d] -> [N, V]``."""
        anatomy = self.anatomy
        return anatomy.unembed(anatomy.final_norm(stream))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        corrupted_input_ids: Tensor | None = None,
        masks: Masks | None = None,
        positions: Tensor | None = None,
        ablated: States | None = None,
    ) -> MaskedCausalLMOutput:
        """Logits of the masked model.

        Args:
            input_ids: clean token ids, ``[B, S]``.
            attention_mask: ``[B, S]``, nonzero at real tokens; padding on the left or the right. Positions count from
                each row's first real token, so padding never changes a logit.
            corrupted_input_ids: removed edges carry the run on these, ``[B, S]``, aligned with ``input_ids``.
            masks: mask values; None: the unmasked model.
            positions: where logits are wanted: bool ``[B, S]``, or int ``[B]`` or ``[B, P]``; None: everywhere (logits
                of padding are 0).
            ablated: what a removed edge carries, instead of ``corrupted_input_ids``: any :class:`States`.

        Returns:
            ``logits``: ``[B, S, V]`` without positions, ``[B, P, V]`` with int positions, ``[N, V]`` with a mask.
        """
        packing, token_ids = self._pack(input_ids, attention_mask)
        wanted = packing.select(positions)
        if masks is None:
            _, stream = run_unmasked(self.anatomy, token_ids, packing, self.backend)
            read = stream.index_select(0, wanted)
        else:
            if ablated is None:
                ablated = self._corrupted_states(input_ids, corrupted_input_ids, packing)
            answers, places = wanted.unique(return_inverse=True)
            read = self.final_read(token_ids, packing, ablated, masks, answers).index_select(0, places)
        return MaskedCausalLMOutput(logits=_arrange(self.unembed(read), packing, positions))

    def final_read(
        self,
        token_ids: Tensor,
        packing: Packing,
        ablated: States,
        masks: Masks,
        answers: Tensor,
        skip_zeros: bool = False,
        recompute: bool | None = None,
        on_device: bool = False,
        trunk: Trunk | None = None,
        changing: Changing | None = None,
    ) -> Tensor:
        """The masked model's final read, before the norm, at packed tokens ``answers`` (no repeats): ``[N, d]``.

        ``skip_zeros`` leaves out what only masks of exactly 0 read, ``on_device`` what of that the device can find
        alone, ``trunk`` keeps lower layers for later runs, ``changing`` names the tokens that can differ from the
        ablated run (see :class:`MaskedRun`); ``recompute`` overrides the model's own.
        """
        anatomy = self.anatomy
        embeds = torch.stack(anatomy.embed(token_ids, packing.position_ids))
        product = masks.product(self.graph).to(device=self.device, dtype=self.mask_dtype)
        recompute = self.recompute if recompute is None else recompute
        run = MaskedRun(
            anatomy,
            self.graph,
            packing,
            embeds,
            ablated,
            answers,
            recompute,
            skip_zeros,
            on_device,
            self.backend,
            self.fused,
            self.gated,
            trunk,
            changing,
        )
        return run(product)

    @property
    def mask_dtype(self) -> torch.dtype:
        """Masks are float64 in a float64 model and float32 in any other."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _corrupted_states(self, input_ids: Tensor, corrupted: Tensor | None, packing: Packing) -> States:
        if corrupted is None:
            raise InputError("masks need corrupted_input_ids (or ablated states): what should a removed edge carry?")
        if corrupted.shape != input_ids.shape:
            raise InputError(
                f"corrupted_input_ids has shape {tuple(corrupted.shape)} and input_ids {tuple(input_ids.shape)}; "
                "clean and corrupted prompts must be aligned token by token"
            )
        return run_unmasked(self.anatomy, self._token_ids(corrupted, packing), packing, self.backend)[0]

    def _pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Packing, Tensor]:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; accepted: [batch, tokens], not empty")
        packing = Packing(input_ids.shape, attention_mask, self.device)
        return packing, self._token_ids(input_ids, packing)

    def _token_ids(self, input_ids: Tensor, packing: Packing) -> Tensor:
        token_ids = packing.pack(input_ids.to(self.device))
        lowest, highest = (int(bound) for bound in token_ids.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(f"token id {wrong} is outside the model's vocabulary of {self.config.vocab_size}")
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and packing.longest > limit:
            raise InputError(f"a prompt has {packing.longest} tokens; the model takes at most {limit}")
        return token_ids


def _arrange(logits: Tensor, packing: Packing, positions: Tensor | None) -> Tensor:
    """Packed logits ``[N, V]`` in the shape the positions ask for."""
    if positions is None:
        if packing.is_full:
            return logits.unflatten(0, tuple(packing.shape))
        padded = logits.new_zeros(packing.shape.numel(), logits.shape[-1])
        return padded.index_copy(0, packing.token_index, logits).unflatten(0, tuple(packing.shape))
    if positions.dtype == torch.bool:
        return logits
    return logits.unflatten(0, (packing.shape[0], -1))


def check_supported(config: Any) -> None:
    """InputError naming the supported architectures unless ``config`` is of one of them."""
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"architecture {config.model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(CONTRIBUTING.md says how to add one)"
        )


def _check_model(model: Any) -> None:
    """InputError unless ``model`` is itself the causal language model of a supported architecture."""
    found = type(model).__name__
    if isinstance(model, PreTrainedModel):
        check_supported(model.config)
        wanted: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model.config.model_type]]
        if isinstance(model, wanted):
            return
        accepted = wanted.__name__
    else:
        accepted = f"a Hugging Face causal language model ({', '.join(ARCHITECTURES)})"
    raise InputError(
        f"a {found} cannot be masked; accepted: {accepted}, as AutoModelForCausalLM.from_pretrained loads it, with its "
        "head and nothing wrapped around it (PEFT: give what merge_and_unload() returns)"
    )


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; with the next line where the first one only announces it."""
    if isinstance(error, KeyError) and " " not in str(error):
        return f"{error} is not known"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
