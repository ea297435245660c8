"""The distillation baseline: how large a student is, that it learns, and what it reports."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.extraction.distillation import answer_logits, distill, largest_student
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.sizes import size_of
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import TINY, tiny_model


@pytest.mark.parametrize("name", TINY)
def test_the_student_has_as_many_layers_as_fit(name):
    model = MaskedCausalLM(tiny_model(name))
    whole = size_of(model.model).blocks
    assert largest_student(model, whole)[1] == 3
    student, layers = largest_student(model, whole - 1)
    assert layers == 2
    assert size_of(student).blocks < whole
    assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 41)
    with pytest.raises(InputError, match=r"a student of one layer has .* more than the 10 allowed"):
        largest_student(model, 10)


def test_a_student_learns_the_teachers_logits():
    model, task = MaskedCausalLM(tiny_model("gpt2")), make_task()
    size = size_of(model.model).blocks
    state = torch.get_rng_state()
    short, long = (distill(model, task, size, epochs) for epochs in (1, 60))
    assert torch.equal(torch.get_rng_state(), state)
    assert (long.layers, long.epochs) == (3, 60)
    assert 1 <= long.best_epoch <= 60
    assert distill(model, task, size, 1).to_dict() == short.to_dict()
    assert short.to_dict() != distill(model, task, size, 1, seed=1).to_dict()
    examples = task.split("test")
    own, teacher = (answer_logits(m, examples).detach().log_softmax(-1) for m in (long.student, model.model))
    kl = (teacher.exp() * (teacher - own)).sum(-1)
    counts = examples.answer_mask.sum(1)
    row = examples.answer_mask.nonzero()[:, 0]
    assert long.kl == pytest.approx(float((kl / counts[row]).sum() / len(examples)))


def test_training_lowers_the_loss():
    model, task = MaskedCausalLM(tiny_model("llama")), make_task()
    train = task.split("train")
    teacher = answer_logits(model.model, train)
    losses = []
    for epochs in (1, 80):
        student = distill(model, task, size_of(model.model).blocks, epochs, most_examples=5).student
        losses.append(float((answer_logits(student, train) - teacher).square().sum(-1).mean()))
    assert losses[1] < losses[0]
    with pytest.raises(InputError, match="epochs is 0"):
        distill(model, task, 10**9, 0)
