"""The artifact of an extraction: a small Hugging Face model, and how it is compiled, saved and loaded."""
