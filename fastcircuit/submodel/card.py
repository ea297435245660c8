"""The model card of a submodel: its README.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastcircuit.submodel.modeling_circuit import CircuitForCausalLM
from fastcircuit.submodel.sizes import Size, size_of


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the model itself does not know.

    Args:
        task: name of the task; ablation: what removed components write (``zero``, ``mean``, ``mean-positional``).
        original: size of the original model.
        metrics: measured values by name; None where there is none.
        speed: measurements, one row each, all with the same keys, which head the columns; may be empty.
        provenance: anything that helps to make the model again, by name.
    """

    task: str
    ablation: str
    original: Size
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    speed: Sequence[Mapping[str, Any]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def model_card(model: CircuitForCausalLM, facts: CardFacts) -> str:
    """The card in Markdown, sections without content left out."""
    source = model.config.source or {}
    sections = [
        _FRONT_MATTER,
        f"# Circuit for {facts.task} in {source.get('model') or source.get('architecture') or 'a transformer'}",
        _summary(model, facts, source),
        _section("Load it", _loading(model)),
        _section("Size", _sizes(size_of(model), facts.original)),
        _section("Metrics", _table(["metric", "value"], [[n, _show(v)] for n, v in facts.metrics.items()])),
        _section("Speed", _speed(facts.speed)),
        _section("What is kept", _kept(source)),
        _section("Provenance", _table(["", ""], [[n, _show(v)] for n, v in facts.provenance.items()])),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- fastcircuit
- circuit
---"""


def _summary(model: CircuitForCausalLM, facts: CardFacts, source: Mapping[str, Any]) -> str:
    lines = [
        f"A part of the model that is enough for one task, `{facts.task}`. Everything else was replaced by what it "
        f"writes under {facts.ablation} ablation. Do not expect it to do anything else well."
    ]
    config = model.config
    if config.constant_positions is not None:
        lines.append(f"Inputs have at most {config.constant_positions} tokens.")
    if config.answer_tokens is not None:
        lines.append(f"Logits are over {len(config.answer_tokens)} answer tokens (`config.answer_tokens`) only.")
    if config.last_position_only:
        lines.append("Logits are of the last position unless `logits_to_keep` says otherwise.")
    return "\n".join(lines)


def _loading(model: CircuitForCausalLM) -> str:
    use = (
        "answer = model.config.answer_tokens[model(**tokenizer(prompt, return_tensors='pt')).logits[0, -1].argmax()]"
        if model.config.answer_tokens is not None
        else "model.generate(**tokenizer(prompt, return_tensors='pt'))"
    )
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "import fastcircuit  # or, without it, pass trust_remote_code=True below",
            "",
            "model = AutoModelForCausalLM.from_pretrained(directory)",
            "tokenizer = AutoTokenizer.from_pretrained(directory)",
            use,
            "```",
        ]
    )


def _sizes(own: Size, original: Size) -> str:
    rows = [
        [name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else ""]
        for name, before, after in (
            ("with embeddings", original.total, own.total),
            ("without embeddings", original.blocks, own.blocks),
        )
    ]
    return _table(["parameters", "original", "circuit", "smaller by"], rows)


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(list(rows[0]), [[_show(value) for value in row.values()] for row in rows]) if rows else ""


def _kept(source: Mapping[str, Any]) -> str:
    heads, mlps = source.get("heads", []), set(source.get("mlps", []))
    rows = [
        [str(layer), ", ".join(str(head) for head in kept), "yes" if layer in mlps else ""]
        for layer, kept in enumerate(heads)
        if kept or layer in mlps
    ]
    return _table(["layer", "heads", "MLP"], rows)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _show(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
