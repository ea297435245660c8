"""A submodel's server: requests that wait together are one batch, beside the same requests one after the other."""

import functools
import queue
from collections.abc import Iterator

import numpy as np
import torch

from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.serving.completion import Completion, Piece
from fastcircuit.serving.engine import Engine
from fastcircuit.serving.sampling import Sampling
from fastcircuit.serving.text import TextStream
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants, Kept

PROMPT, NEW = 8, 24


def cases(target: Target) -> Iterator[Case]:
    for requests in (16,) if target.quick else (1, 4, 16, 32):
        yield Case(
            suite="serving",
            name="greedy completions",
            shape=f"stories260K without 2 MLPs, {requests} requests, {PROMPT} + {NEW} tokens",
            dtype="float32",
            device=target.device,
            setup=functools.partial(Operands, requests, target.device),
            variants={"fastcircuit": engine, "generate": one_by_one},
            baseline="generate",
            counts_memory=not target.quick,
        )


class Operands:
    """A submodel of the shipped model, and prompts ``[requests, PROMPT]``."""

    def __init__(self, requests: int, device: str) -> None:
        self.tokenizer = load_tokenizer("stories260K")
        model = load_model("stories260K", device)
        config = model.config
        layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        kept = Kept(np.ones((layers, heads), dtype=bool), np.ones(layers, dtype=bool))
        kept.mlps[1:3] = False
        constants = Constants(torch.zeros(layers, heads, 1, width // heads), torch.zeros(layers, 1, width))
        self.model = compile_submodel(model, kept, constants).eval().to(device)
        self.model.generation_config.eos_token_id = None  # every answer is NEW tokens long
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(3, config.vocab_size, (requests, PROMPT), generator=generator)

    @functools.cached_property
    def expected(self) -> list[str]:
        """The text of every answer, by ``generate`` on its own."""
        return one_answer_each(self)


@torch.inference_mode()
def one_answer_each(operands: Operands) -> list[str]:
    """``generate``, one prompt after the other."""
    texts = []
    for prompt in operands.prompts.to(operands.model.device):
        out = operands.model.generate(prompt[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist()
        stream = TextStream(operands.tokenizer, out[:PROMPT])
        texts.append("".join(map(stream.push, out[PROMPT:])) + stream.finish())
    return texts


def one_by_one(operands: Operands) -> Variant:
    return Variant(lambda: one_answer_each(operands), lambda: None if operands.expected else "there are no answers")


def engine(operands: Operands) -> Variant:
    """All requests at once to an engine, until the last piece of the last answer."""
    serving = Engine(operands.model, operands.tokenizer)

    def call() -> list[str]:
        pieces: queue.Queue[Piece] = queue.Queue()
        prompts = operands.prompts.tolist()
        serving.submit(
            [
                Completion(i, ids, NEW, Sampling(0, 1, None), TextStream(operands.tokenizer, ids), pieces.put)
                for i, ids in enumerate(prompts)
            ]
        )
        texts, left = [""] * len(prompts), len(prompts)
        while left:
            piece = pieces.get()
            if piece.error is not None:
                raise RuntimeError(piece.error)
            texts[piece.index] += piece.text
            left -= piece.is_last
        return texts

    def check() -> str | None:
        texts = call()
        different = [i for i, (a, b) in enumerate(zip(texts, operands.expected, strict=True)) if a != b]
        return f"{len(different)} of {len(texts)} answers differ from generate's" if different else None

    return Variant(call, check, close=serving.close)
