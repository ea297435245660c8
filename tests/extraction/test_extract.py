"""``extract``: from a model and a task to a saved submodel."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcircuit import Circuit, extract, load_task
from fastcircuit.discovery.rounding import top_circuit
from fastcircuit.errors import InputError
from fastcircuit.extraction.extract import answer_tokens_of, kept_by, run_extraction
from fastcircuit.masks import Masks
from fastcircuit.models.loading import load_model, load_tokenizer

SHIPPED = {"stories260K": "pronoun", "induction-gpt2": "induction"}


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    name = request.param
    return load_model(name), load_task(SHIPPED[name], load_tokenizer(name)), load_tokenizer(name)


def test_at_the_defaults_accuracy_stays_and_the_directory_loads(shipped, tmp_path):
    model, task, tokenizer = shipped
    extraction = run_extraction(model, task)
    assert extraction.metrics["accuracy_change"].mean >= -0.01
    assert extraction.size.total <= extraction.original.total
    if task.name == "induction":
        assert extraction.kept.heads.all()
    extraction.save(tmp_path / "sub", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sub")
    examples = task.split("test").select(torch.arange(5))
    ids, mask = examples.input_ids, examples.attention_mask
    torch.testing.assert_close(
        loaded(ids, attention_mask=mask).logits[mask.bool()],
        extraction.submodel(ids, attention_mask=mask).logits[mask.bool()],
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "sub").get_vocab() == tokenizer.get_vocab()
    card = (tmp_path / "sub" / "README.md").read_text()
    assert f"# Circuit for {task.name} in {model.name}" in card
    assert model.name in SHIPPED  # not the directory it lies in here
    assert f"{extraction.size.total:,}" in card


def test_metrics_are_those_of_the_submodel(shipped):
    model, task, _ = shipped
    extraction = run_extraction(model, task, threshold=0.02)
    test = task.split("test")
    with torch.no_grad():
        logits = extraction.submodel(test.input_ids, attention_mask=test.attention_mask).logits
        full = model(test.input_ids, test.attention_mask).logits
    own, reference = (values[test.answer_mask].log_softmax(-1) for values in (logits, full))
    divergence = (reference.exp() * (reference - own)).sum(-1)
    counts = test.answer_mask.sum(1)
    rows = torch.repeat_interleave(torch.arange(len(test)), counts)
    mean = torch.zeros(len(test)).index_add(0, rows, divergence) / counts
    assert float(mean.mean()) == pytest.approx(extraction.metrics["kl"].mean, abs=1e-5)


def test_extract_returns_the_submodel(shipped):
    model, task, _ = shipped
    assert type(extract(model.model, task)).__name__ == "CircuitForCausalLM"


def test_of_an_edge_circuit(shipped):
    model, task, _ = shipped
    whole = run_extraction(model, task, circuit=Circuit.full(model.graph))
    assert whole.kept.heads.all()
    assert whole.kept.mlps.all()
    assert whole.circuit_kl == pytest.approx(0, abs=1e-6)
    scores = np.random.default_rng(0).normal(size=model.graph.num_edges)
    circuit = top_circuit(model.graph, scores, model.graph.num_edges // 3)
    part = run_extraction(model, task, circuit=circuit)
    assert part.kept.heads.sum() == sum(".h" in node for node in circuit.nodes)
    test = task.split("test")
    masks = Masks.from_circuit(circuit)
    edge = model(test.input_ids, test.attention_mask, test.corrupted_input_ids, masks, test.answer_mask).logits
    with torch.no_grad():
        own = part.submodel(test.input_ids, attention_mask=test.attention_mask).logits[test.answer_mask]
    divergence = torch.nn.functional.kl_div(
        own.log_softmax(-1), edge.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    counts = test.answer_mask.sum(1)
    rows = torch.repeat_interleave(torch.arange(len(test)), counts)
    mean = torch.zeros(len(test)).index_add(0, rows, divergence.detach()) / counts
    assert part.circuit_kl == pytest.approx(float(mean.mean()), rel=1e-4)


def test_a_circuit_without_components_is_refused(shipped):
    model, task, _ = shipped
    graph = model.graph
    circuit = Circuit.from_edges(graph, [(graph.writers[0], "resid_post")])
    with pytest.raises(InputError, match="keeps no head and no MLP"):
        run_extraction(model, task, circuit=circuit)
    assert not kept_by(Circuit.from_edges(graph, [("m0", "resid_post")])).heads.any()


def test_answers_only(shipped):
    model, task, _ = shipped
    tokens = answer_tokens_of(task)
    submodel = extract(model, task, answers_only=True)
    assert list(submodel.config.answer_tokens) == list(tokens)
    examples = task.split("test").select(torch.arange(3))
    whole = extract(model, task)(examples.input_ids[:, :4]).logits[:, -1:]
    torch.testing.assert_close(submodel(examples.input_ids[:, :4]).logits, whole[..., list(tokens)])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold": 0.01}, "--threshold"),
        ({"kl_budget": 0.1, "size_budget": 0.5}, "--kl-budget, --size-budget"),
        ({"include_mlps": False}, "--no-mlps"),
    ],
)
def test_a_circuit_leaves_nothing_to_search(shipped, options, named):
    model, task, _ = shipped
    with pytest.raises(InputError, match=f"^{named}: with --circuit the circuit says what is kept"):
        run_extraction(model, task, circuit=Circuit.full(model.graph), **options)


def test_answers_of_a_task_that_names_none_cannot_be_compared_with_a_circuit(shipped):
    model, task, _ = shipped
    circuit = Circuit.full(model.graph)
    nameless = dataclasses.replace(task, answer_tokens=None, splits={})  # nothing to do any work on
    with pytest.raises(InputError, match=r"names no answer tokens.*leave out --answers-only"):
        run_extraction(model, nameless, circuit=circuit, answers_only=True)


def test_means_per_position_of_a_circuit_need_test_prompts_as_long():
    model, task = load_model("stories260K"), load_task("pronoun", load_tokenizer("stories260K"))
    splits = {}
    for name, length in (("train", 12), ("test", 13)):
        examples = task.split(name)
        splits[name] = examples.select(examples.attention_mask.sum(1) == length)
    uneven = dataclasses.replace(task, splits=splits)
    with pytest.raises(InputError, match="these have 12 to 13 tokens"):
        run_extraction(model, uneven, circuit=Circuit.full(model.graph), ablation="mean-positional")
