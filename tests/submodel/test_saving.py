"""A saved submodel: loads with and without fastcircuit, equal to the bit; what is damaged is refused in one line."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcircuit import zoo
from fastcircuit.errors import InputError, RunError
from fastcircuit.models.loading import load_tokenizer
from fastcircuit.submodel.card import CardFacts, model_card
from fastcircuit.submodel.saving import load_submodel, save_submodel
from fastcircuit.submodel.sizes import size_of
from tests.submodel.circuits import CIRCUITS, ZOO, load, partial, token_ids


@pytest.fixture(scope="module", params=[(name, kind) for name in ZOO for kind in CIRCUITS], ids="-".join)
def saved(request, tmp_path_factory):
    name, kind = request.param
    _, _, submodel = CIRCUITS[kind](load(name, torch.float32), "mean-positional")
    directory = tmp_path_factory.mktemp("submodel") / "circuit"
    tokenizer = load_tokenizer(name)
    save_submodel(submodel, directory, tokenizer=tokenizer, card="# card\n")
    return submodel, directory, tokenizer


@pytest.fixture
def small(tmp_path):
    """A small saved submodel to damage."""
    _, _, submodel = partial(load("gpt2", torch.float32))
    directory = tmp_path / "circuit"
    save_submodel(submodel, directory)
    return submodel, directory


def test_auto_classes_load_it(saved):
    submodel, directory, tokenizer = saved
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(loaded) is type(submodel)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = token_ids(submodel)
    assert torch.equal(loaded(ids).logits, submodel(ids).logits)
    assert torch.equal(load_submodel(directory)(ids).logits, submodel(ids).logits)
    assert load_submodel(directory, dtype="bfloat16").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(directory).decode(ids[0]) == tokenizer.decode(ids[0])
    assert (directory / "README.md").read_text() == "# card\n"


def test_directory_loads_without_fastcircuit(saved, tmp_path):
    submodel, directory, _ = saved
    ids = token_ids(submodel)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = f"""
import sys
sys.modules["fastcircuit"] = None  # importing it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
ids = load_file({str(tmp_path / "ids.safetensors")!r})["ids"]
made = model.generate(ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=4, do_sample=False)
save_file({{"logits": model(ids).logits, "made": made}}, {str(tmp_path / "logits.safetensors")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    result = load_file(tmp_path / "logits.safetensors")
    torch.testing.assert_close(result["logits"], submodel(ids).logits)  # its threads need not be as many as ours
    prompt = ids[:, :4]
    expected = submodel.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert torch.equal(result["made"], expected)
    for name in ("configuration_circuit.py", "modeling_circuit.py"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_only_safetensors_and_text_are_written(saved):
    _, directory, _ = saved
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors", ".py", ".md"}
    assert list(directory.parent.iterdir()) == [directory]


def test_existing_directory_is_left_alone(small):
    submodel, directory = small
    before = sorted(directory.iterdir())
    with pytest.raises(InputError, match="exists already; choose another --out"):
        save_submodel(submodel, directory)
    assert sorted(directory.iterdir()) == before


def test_nothing_is_left_of_a_save_that_fails(small, monkeypatch):
    submodel, directory = small

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(submodel), "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        save_submodel(submodel, directory.parent / "second")
    assert list(directory.parent.iterdir()) == [directory]


def test_nan_weights_are_neither_saved_nor_loaded(small):
    submodel, directory = small
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.parts.0.up_proj.bias"][0] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weight model.layers.0.parts.0.up_proj.bias holds NaN"):
        load_submodel(directory)
    with torch.no_grad():
        submodel.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="holds NaN or infinity"):
        save_submodel(submodel, directory.parent / "second")
    assert not (directory.parent / "second").exists()


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_weights(small, keep):
    _, directory = small
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot load submodel") as error:
        load_submodel(directory)
    _one_line(error)


def test_foreign_weights(small):
    _, directory = small
    shutil.copy(zoo.path("induction-gpt2") / "model.safetensors", directory / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_submodel(directory)
    assert "weight" in _one_line(error)


def test_weights_of_another_size(small):
    _, directory = small
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.parts.0.up_proj.bias"] = torch.zeros(5)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"parts.0.up_proj.bias: \[5\] instead of \[\d+\]") as error:
        load_submodel(directory)
    _one_line(error)


def test_directories_that_are_no_submodel(small, tmp_path):
    _, directory = small
    with pytest.raises(InputError, match="no such model directory"):
        load_submodel(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such directory: nowhere; name one that"):
        load_submodel("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no config.json in it"):
        load_submodel(tmp_path / "empty")
    with pytest.raises(InputError, match="a model of type 'gpt2', not a submodel"):
        load_submodel(zoo.path("induction-gpt2"))
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*config.json"):
        load_submodel(directory)
    with pytest.raises(InputError, match="dtype is 'int8'; accepted: float32"):
        load_submodel(directory, dtype="int8")


def test_card_has_what_was_measured():
    model = load("stories260K", torch.float32)
    _, _, submodel = partial(model, answer_tokens=[4, 5])
    facts = CardFacts(
        task="pronoun",
        ablation="mean",
        original=size_of(model.model),
        metrics={"accuracy": 0.98765, "kl": None},
        speed=[
            {"batch": 1, "original (ms)": 2.5, "circuit (ms)": 1.0},
            {"batch": 8, "original (ms)": 9, "circuit (ms)": 3},
        ],
        provenance={"threshold": 0.01, "note": "a|b"},
    )
    card = model_card(submodel, facts)
    for line in (
        "| accuracy | 0.9877 |",
        "| kl | not measured |",
        "| 8 | 9 | 3 |",
        "| note | a\\|b |",
        "Logits are over 2 answer tokens",
    ):
        assert line in card
    total, blocks = size_of(model.model).total, size_of(model.model).blocks
    assert re.search(rf"\| with embeddings \| {total:,} \| [\d,]+ \| \d", card)
    assert blocks < total == sum(parameter.numel() for parameter in model.model.parameters())
    without_speed = model_card(submodel, CardFacts(task="pronoun", ablation="mean", original=size_of(model.model)))
    assert "## Speed" not in without_speed
    assert "## Size" in without_speed


def test_size_counts_a_tied_matrix_once_and_no_embedding_as_block():
    model = load("gpt2", torch.float32).model
    size = size_of(model)
    assert size.total - size.blocks == (model.config.vocab_size + model.config.n_positions) * model.config.n_embd
