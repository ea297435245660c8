"""The model of most tests here."""

import pytest
import torch

from fastcircuit.models.masked import MaskedCausalLM
from tests.models.tiny import tiny_model


@pytest.fixture
def model():
    return MaskedCausalLM(tiny_model("llama", torch.float32))
