"""Stand-ins for what the ``tracr`` package compiles, over the weights of the two programs of the Edge Pruning paper.

They have the attributes of ``tracr.compiler.assemble.AssembledTransformerModel`` that fastcircuit reads, and no more.
The arrays in ``data/tracr`` were published with Edge Pruning (princeton-nlp/Edge-Pruning, data.zip, MIT), here
as safetensors and JSON instead of a pickle.
"""

import json
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

DATA = Path(__file__).parent / "data" / "tracr"
FRACTIONS = {str(value): float(value) for value in sorted({Fraction(k, n) for n in range(1, 6) for k in range(n + 1)})}


def assembled(name):
    """The stand-in for the compiled program ``reverse`` or ``xproportion``."""
    arrays = load_file(DATA / f"{name}.safetensors")
    description = json.loads((DATA / f"{name}.json").read_text())
    shape, vocabulary = description["config"], description["vocab"]
    output = arrays.pop("unembedding_mtx", None)
    encoder = SimpleNamespace(encoding_map={"1": 0, "2": 1, "3": 2})
    if output is None:  # a number, read from the first direction of the stream
        output, encoder = np.eye(arrays["token_embed_embeddings"].shape[1], 1, dtype=np.float32), SimpleNamespace()
    params = {}
    for key, value in arrays.items():
        module, parameter = key.rsplit("_", 1)
        params.setdefault(module, {})[parameter] = value
    return SimpleNamespace(
        params=params,
        model_config=SimpleNamespace(
            num_heads=shape["num_heads"],
            num_layers=shape["num_layers"],
            key_size=len(params["transformer/layer_0/attn/key"]["b"]) // shape["num_heads"],
            mlp_hidden_size=shape["mlp_hidden_size"],
            activation_function=lambda x: max(x, 0.0),
            layer_norm=shape["layer_norm"],
            causal=shape["causal"],
        ),
        input_encoder=SimpleNamespace(encoding_map=vocabulary, bos_token=shape["bos"], pad_token=shape["pad"]),
        output_encoder=encoder,
        get_compiled_model=lambda: SimpleNamespace(unembed=lambda x, use_unembed_argmax: (x @ output).squeeze()),
    )


def stand_in_for_haiku(monkeypatch):
    """The two functions of haiku that are used, which tracr brings along: here there is nothing to transform."""
    haiku = ModuleType("haiku")
    haiku.transform = lambda function: SimpleNamespace(apply=lambda params, *args: function(*args))
    haiku.without_apply_rng = lambda transformed: transformed
    monkeypatch.setitem(sys.modules, "haiku", haiku)
