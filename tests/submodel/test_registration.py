"""The Auto classes know submodels once fastcircuit is imported, in whatever order and at no cost."""

import subprocess
import sys

import pytest

_CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("fastcircuit")
for auto in (AutoModel, AutoModelForCausalLM):
    assert type(auto.from_config(config)).__module__ == "fastcircuit.submodel.modeling_circuit"
"""


@pytest.mark.parametrize(
    "before",
    [
        "import fastcircuit",
        "from transformers import AutoModelForCausalLM; import fastcircuit",
        "import fastcircuit; from transformers import GPT2LMHeadModel",
        "import fastcircuit; from transformers.models.llama import modeling_llama",
        "from fastcircuit.submodel.configuration_circuit import CircuitConfig; CircuitConfig()",
        "from fastcircuit.submodel.registration import register; register(); register()",
    ],
)
def test_auto_classes_know_submodels(before):
    subprocess.run([sys.executable, "-c", f"{before}\n{_CHECK}"], check=True)


def test_import_stays_light():
    code = "import sys, fastcircuit; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
