"""constraints.txt can be met: with the torch of PyPI, with its build without CUDA, and with what pyproject asks for."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
CONSTRAINTS = {r.name: r.specifier for r in map(Requirement, (line for line in LINES if line and line[0] != "#"))}
# What torch 2.13.0 of PyPI requires on Linux; the build without CUDA that tests usually run on requires none of it.
REQUIRED_BY_TORCH = {"2.13.0": "triton==3.7.1"}


def _required_by_torch():
    (pin,) = CONSTRAINTS["torch"]
    installed = [r for r in importlib.metadata.requires("torch") or [] if "extra ==" not in r]
    return [Requirement(text) for text in (REQUIRED_BY_TORCH[pin.version], *installed)]


@pytest.mark.parametrize("requirement", _required_by_torch(), ids=str)
def test_no_constraint_forbids_what_torch_requires(requirement):
    if not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        return
    for exact in (s for s in requirement.specifier if s.operator == "==" and requirement.name in CONSTRAINTS):
        assert exact.version in CONSTRAINTS[requirement.name]


def test_the_constraints_are_within_what_the_package_asks_for():
    text = (ROOT / "pyproject.toml").read_text()
    for name, constraint in CONSTRAINTS.items():
        (asked,) = set(re.findall(rf'"({name}>=[^";]+)', text))
        for bound in constraint:
            if bound.operator in ("==", ">="):
                assert bound.version in Requirement(asked).specifier
