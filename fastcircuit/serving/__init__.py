"""Extracted circuits behind the OpenAI completions API."""
