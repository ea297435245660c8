"""The one registry: every case of every suite."""

import importlib

from fastcircuit.benchmarks import SUITES
from fastcircuit.benchmarks.case import Case, Target
from fastcircuit.errors import InputError


def load(suite: str, target: Target) -> list[Case]:
    """The cases of ``suite`` (every suite's for "all") on ``target``, in order; nothing is made yet.

    Raises:
        InputError: there is no such suite.
    """
    if suite == "all":
        return [case for name in SUITES for case in load(name, target)]
    if suite not in SUITES:
        raise InputError(f"no suite {suite!r}; suites: {', '.join(SUITES)}, or all")
    found: list[Case] = list(importlib.import_module(f"fastcircuit.benchmarks.suites.{suite}").cases(target))
    keys = [case.key for case in found]
    repeated = {key for key in keys if keys.count(key) > 1}
    if repeated:
        raise ValueError(f"cases with the same name: {', '.join(sorted(repeated))}")
    return found
