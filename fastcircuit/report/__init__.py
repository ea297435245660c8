"""Drawings of circuits."""

from fastcircuit.report.draw import draw

__all__ = ["draw"]
