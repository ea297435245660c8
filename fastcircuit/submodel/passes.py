"""Compile passes: each maps a :class:`Program` to a smaller one that computes the same."""

import dataclasses
from collections.abc import Sequence

import torch

from fastcircuit.errors import InputError
from fastcircuit.submodel.parts import AttentionPart, Block, ConstantPart, MlpPart, Norm, Part, Program


def merge_constants(program: Program) -> Program:
    """As few constants as possible: those with no reader between them are added up, single vectors become biases.

    A vector joins the output bias of the part that writes before it in its block; in front of everything else, a
    constant joins the position table. Constants that differ by position stay, constants of zeros go. Blocks are looked
    at one by one, so cut them first (:func:`drop_empty_blocks`).
    """
    blocks = [_merge_in_block(block) for block in program.blocks]
    positions = program.positions
    front = blocks[0][0] if blocks[0] else None
    if positions is not None and isinstance(front, ConstantPart):
        values = front.values
        del blocks[0][0]
        known = positions.shape[0] if values.shape[0] == 1 else values.shape[0]
        positions = positions[:known].double() + values[: positions.shape[0]]
    return dataclasses.replace(program.with_blocks(blocks), positions=positions)


def _merge_in_block(block: Block) -> list[Part]:
    merged: list[Part] = []
    for part in block:
        before = merged[-1] if merged else None
        if not isinstance(part, ConstantPart):
            merged.append(part)
        elif not bool(part.values.any()):
            continue
        elif isinstance(before, ConstantPart):
            merged[-1] = ConstantPart(before.values + part.values)
        elif before is not None and part.values.shape[0] == 1:
            merged[-1] = dataclasses.replace(before, output=before.output.add_bias(part.values[0]))
        else:
            merged.append(part)
    return merged


def drop_empty_blocks(program: Program) -> Program:
    """Blocks are cut anew, so that each holds exactly one attention.

    What a layer without heads still writes joins the block before it (what comes before the first attention: the block
    behind it). So layers of the cache and blocks are the same thing, and no cache layer stays empty. A circuit without
    any attention is one block.
    """
    blocks: list[list[Part]] = [[]]
    for part in program.parts:
        if isinstance(part, AttentionPart) and any(isinstance(other, AttentionPart) for other in blocks[-1]):
            blocks.append([])
        blocks[-1].append(part)
    return program.with_blocks(blocks)


def fold_norms(program: Program) -> Program:
    """Norm weights (and a LayerNorm's bias) become part of the projections that read the norm.

    The final norm keeps its own when the unembedding is the token embedding: folding would make two matrices of one.
    """

    def fold(part: Part) -> Part:
        if isinstance(part, AttentionPart):
            query, key, value = (part.norm.fold_into(affine) for affine in (part.query, part.key, part.value))
            return dataclasses.replace(part, norm=Norm(None), query=query, key=key, value=value)
        if isinstance(part, MlpPart):
            gate = None if part.gate is None else part.norm.fold_into(part.gate)
            return dataclasses.replace(part, norm=Norm(None), gate=gate, up=part.norm.fold_into(part.up))
        return part

    blocks: list[Block] = [tuple(fold(part) for part in block) for block in program.blocks]
    program = program.with_blocks(blocks)
    if program.tied:
        return program
    return dataclasses.replace(program, final_norm=Norm(None), head=program.final_norm.fold_into(program.head))


def restrict_to_answers(program: Program, answer_tokens: Sequence[int]) -> Program:
    """Logits of these token ids only, in this order.

    Raises:
        InputError: no token, one that is given twice, or one outside the vocabulary.
    """
    tokens = tuple(int(token) for token in answer_tokens)
    vocabulary = program.head.weight.shape[0]
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(f"answer token {wrong} is outside the model's vocabulary of {vocabulary}")
    if not tokens or len(set(tokens)) < len(tokens):
        raise InputError(f"answer_tokens are {list(tokens)}; give each token id once, and at least one")
    rows = torch.tensor(tokens, device=program.head.weight.device)
    return dataclasses.replace(program, head=program.head.rows(rows), tied=False, answer_tokens=tokens)
