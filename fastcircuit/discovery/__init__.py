"""Finding circuits: which edges carry a behaviour."""

from fastcircuit.discovery.discovery import Discovery, discover
from fastcircuit.discovery.presets import PRESETS, preset
from fastcircuit.discovery.settings import Settings

__all__ = ["PRESETS", "Discovery", "Settings", "discover", "preset"]
