"""Finding circuits: which edges carry a behaviour."""

from fastcircuit.discovery.attribution import attribute
from fastcircuit.discovery.baselines import BaselineSettings
from fastcircuit.discovery.discovery import Discovery, discover
from fastcircuit.discovery.presets import PRESETS, preset
from fastcircuit.discovery.scores import Scores
from fastcircuit.discovery.settings import Settings

__all__ = ["PRESETS", "BaselineSettings", "Discovery", "Scores", "Settings", "attribute", "discover", "preset"]
