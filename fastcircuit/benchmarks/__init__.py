"""The benchmark suite: ``fastcircuit bench``. A suite is a module in ``suites`` with a function ``cases(target)``."""

# In the order in which they run; no torch is imported to know them.
SUITES = {
    "ops": "the compiled operations beside torch's",
    "step": "a training step of Edge Pruning beside the published method's",
    "cache": "the full model's answers and the corrupted activations, once per example",
    "discovery": "Edge Pruning end to end on stories260K",
    "attribution": "EAP, EAP-IG and ACDC beside the published ways",
    "extraction": "Algorithm 1 beside the published loop",
    "inference": "submodels beside the Hugging Face model: eager, sdpa, compiled",
    "serving": "requests answered as batches beside one after the other",
    "scaling": "time and memory against writers, readers, tokens, layers, sparsity",
}
