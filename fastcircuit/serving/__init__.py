"""Extracted circuits behind the OpenAI completions API: FastAPI over ``generate``.

Serving libraries that batch were tried first. LitServe 0.2 runs models in processes that cannot be told that a client
hung up, and leaves them behind when it is terminated; the continuous batching of transformers 5 needs as many
key-value heads in every layer, which circuits do not have. ``generate`` with settings per row does what is needed.
"""
