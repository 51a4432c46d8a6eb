"""`tafs new model NAME` writes a model plug-in that runs as it is.

The file tafs/models/plugins/NAME.py adds an entry to the catalogue; for a pipeline class that no
backbone trains yet it also holds a backbone.
"""

from __future__ import annotations

import re
from pathlib import Path

from tafs.common import errors, stubs
from tafs.models import catalog

FOLDER = Path("tafs/models/plugins")
PIPELINE = "StableDiffusion3Pipeline"

HEAD = '''"""{title} (authors, year, arXiv number).

Card of OWNER/REPOSITORY on huggingface.co: steps, guidance, tokens.
"""

from __future__ import annotations
'''
IMPORTS = """
from tafs.models import ModelPlugin
"""
BACKBONE = '''
from collections.abc import Sequence

from torch import Tensor

from tafs.models import TIMESTEPS, Backbone, Conditioning, ModelPlugin


class {title}Backbone(Backbone):
    """(The network, its text encoders, and how it is guided.)

    Written for networks with cross-attention to one text encoder, an attention mask, and
    classifier-free guidance. Compare with the call of {pipeline} in diffusers.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def negative_prompt(self) -> str | None:
        return "" if self.guidance > 1 else None

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(embeds, embeds.new_zeros(len(prompts), 0), mask=mask)

    def network(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        output = self.transformer(
            hidden_states=x_t.to(self.transformer.dtype),
            encoder_hidden_states=cond.embeds,
            encoder_attention_mask=cond.mask,
            timestep=t * TIMESTEPS,
            return_dict=False,
        )
        return output[0].float()
'''
PLUGIN = """
PLUGIN = ModelPlugin(
    # The keys are explained in tafs/models/models.yaml.
    models={{
        "{name}": {{
            "title": "{title}",
            "resource": "{resource}",  # an entry of resources.yaml
            "pipeline": "{pipeline}",
            "trainable": True,
            "steps": {steps},
            "guidance": {guidance},
            "max_sequence_length": {max_sequence_length},
            "licence": "{licence}",
        }},
    }},
{backbones})
"""


def write(name: str, pipeline: str = PIPELINE, folder: Path = FOLDER) -> Path:
    """Write the plug-in and return its file.

    The entry has the values of the first published model with this pipeline class, if any.

    Args:
        name: of the model, as in config.yaml.
        pipeline: the diffusers pipeline class.
        folder: where the file is written.

    Raises:
        ValueError: a name is invalid or taken, or the folder does not exist.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 64:
        raise ValueError(
            f"{errors.shown(name)} is not a valid name: use lower-case letters, digits and hyphens"
        )
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*Pipeline", pipeline):
        raise ValueError(
            f"--pipeline {errors.shown(pipeline)}: is not a pipeline class of diffusers, like "
            f"{PIPELINE}"
        )
    models = catalog.read()
    if name in models:
        raise ValueError(f"{name!r} is taken; choose another name")
    published = [m for m in models.values() if (m.assets, m.pipeline) == ("hub", pipeline)]
    like = published[0] if published else None
    guidance = None if like is None else like.guidance
    length = None if like is None else like.max_sequence_length
    title = "".join(part.capitalize() for part in name.split("-"))
    trained = pipeline in catalog.backbones()
    parts = [HEAD, IMPORTS, PLUGIN] if trained else [HEAD, BACKBONE, "\n", PLUGIN]
    text = "".join(parts).format(
        name=name,
        title=title,
        pipeline=pipeline,
        resource=like.resource if like else name,
        steps=like.steps if like else 28,
        guidance=4.5 if guidance is None else guidance,
        max_sequence_length=length or 256,
        licence=like.licence if like else "(the name of the licence)",
        backbones="" if trained else f'    backbones={{"{pipeline}": {title}Backbone}},\n',
    )
    return stubs.write(catalog.PLUGINS, name.replace("-", "_"), folder, text)


def create(name: str, pipeline: str = PIPELINE) -> str:
    """Write the plug-in; return what was written and what to do next. The errors are `write`'s."""
    file = write(name, pipeline)
    return (
        f"Wrote {file}. Next (docs/adding-a-model.md):\n"
        f"  1. Add its repository to resources.yaml and correct the values in {file.name}.\n"
        f"  2. python -m pytest tests/models -k {file.stem}\n"
        f"  3. Set it in config.yaml: scales, model_roles."
    )
