"""Text-to-image models: what the file of a model plug-in imports.

`Backbone` is the base class of the models that are trained, `Conditioning` what a network is told
about the prompts, and `ModelPlugin` what a plug-in adds: entries of the catalogue, and backbones.
"""

from tafs.models.base import ATTENTION, TIMESTEPS, Backbone
from tafs.models.catalog import ModelPlugin
from tafs.models.conditioning import Conditioning

__all__ = ["ATTENTION", "TIMESTEPS", "Backbone", "Conditioning", "ModelPlugin"]
