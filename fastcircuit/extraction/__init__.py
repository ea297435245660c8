"""Extraction: the heads and MLPs that are enough for a task (Algorithm 1 of the circuit extraction paper)."""

from fastcircuit.extraction.prune import Pruning, Sweep, prune, sweep

__all__ = ["Pruning", "Sweep", "prune", "sweep"]
