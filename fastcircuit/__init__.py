"""Find circuits in transformers and turn them into small, fast models."""
