"""What ``generate`` answers, one prompt at a time."""

import torch
from transformers import set_seed


def token_ids(models, name, prompt):
    return models[name][1](prompt).input_ids if isinstance(prompt, str) else prompt


def generated(models, name, prompt, max_tokens=16, temperature=0, top_p=1.0, seed=None):
    """The text that the model's own ``generate`` writes behind a prompt."""
    model, tokenizer = models[name]
    ids = token_ids(models, name, prompt)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    if seed is not None:
        set_seed(seed)
    one = torch.tensor([ids])
    whole = model.generate(
        one,
        attention_mask=torch.ones_like(one),
        max_new_tokens=max_tokens,
        pad_token_id=0,
        **(sampling or {"do_sample": False}),
    )[0].tolist()
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids, whole)]
    return texts[1][len(texts[0]) :]
