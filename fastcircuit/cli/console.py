"""Where output goes: tables and JSON to stdout, progress and errors to stderr."""

import json
from typing import Any

from rich.console import Console

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """The one line on stdout that ``--json`` promises."""
    print(json.dumps(value, allow_nan=False))
