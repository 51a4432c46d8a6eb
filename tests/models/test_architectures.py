"""Sizes computed from a configuration equal those counted on the network."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tafs.models import architectures, catalog, flops
from tafs.models.architectures import PUBLISHED
from tafs.shapes import weights
from tafs.words import ROOT as WORDS

ROOTS = {"shapes": weights.ROOT, "words": WORDS}
MODELS = catalog.read().items()
SIZED = [n for n, m in MODELS if m.pipeline in architectures.SIZES and n == m.resource]
COMPARED = [n for n, m in MODELS if m.pipeline in architectures.COMPARED]


@pytest.mark.parametrize("name", SIZED)
def test_a_size_is_that_of_the_network(name):
    model = catalog.read()[name]
    embedded = model.assets in ROOTS
    folder = weights.verify(name, ROOTS[model.assets]) if embedded else None
    known = architectures.of_folder(folder, model) if folder else PUBLISHED[name]
    resolution, rank = (24, 4) if embedded else (512, 32 if model.trainable else None)
    backbone = flops.build(
        known,
        model,
        resolution=resolution,
        dtype=torch.bfloat16,
        device=flops.META,
        lora_rank=rank,
    )
    found = architectures.size(known, model, resolution, rank)
    assert found.forward == flops.forward(backbone)
    assert found.adapter == sum(p.numel() for p in backbone.lora_parameters().values())
    stored = [*backbone.transformer.parameters(), *backbone.transformer.buffers()]
    assert found.weights == sum(tensor.numel() for tensor in stored) - found.adapter
    inside = [module for block in backbone.blocks for module in block.named_modules()]
    linear = [m for name, m in inside if isinstance(m, nn.Linear) and "lora_" not in name]
    assert found.matrices == sum(m.weight.numel() for m in linear)
    assert found.largest == max(m.weight.numel() for m in linear)


@pytest.mark.parametrize("name", COMPARED)
def test_an_evaluation_of_a_compared_network_has_the_counted_flops(name):
    """HiDream-I1 smaller and on the CPU: which experts a token takes depends on numbers."""
    model = catalog.read()[name]
    known = PUBLISHED[model.resource]
    hidream = model.pipeline == "HiDreamImagePipeline"
    if hidream:
        layers = {"num_layers": 1, "num_single_layers": 2, "llama_layers": (0, 1, 1)}
        sizes = {"num_attention_heads": 2, "caption_channels": (48, 64), "text_emb_dim": 32}
        known = replace(known, transformer={**known.transformer, **layers, **sizes})
    kind = diffusers.HiDreamImageTransformer2DModel if hidream else diffusers.SanaTransformer2DModel
    with torch.device("cpu" if hidream else "meta"):
        network, time, text = kind(**known.transformer).eval(), torch.ones(1), known.tokens
        if hidream:
            x = torch.ones(1, 16, 32, 32)
            given = [time, torch.ones(1, text, 48), torch.ones(2, 1, text, 64), torch.ones(1, 32)]
        else:
            x, given = torch.ones(1, 32, 8, 8), [torch.ones(1, text, 2304), time]
            given += [time] if model.pipeline == "SanaSprintPipeline" else []
        counter = FlopCounterMode(display=False)
        # The kernel of the CPU's default attention is not counted.
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(x, *given)
    counted = counter.get_total_flops() * architectures.evaluations(model)
    assert architectures.forward(known, model, 256, None) == counted
    assert architectures.evaluations(model) == (2 if name in ("hidream-full", "sana-1-5") else 1)


@pytest.mark.parametrize(
    "name, parameters", [("sd35-large", 8_056_627_520), ("flux-schnell", 11_891_178_560)]
)
def test_compared_models_have_their_published_numbers_of_parameters(name, parameters):
    network_class = flops.NETWORKS[catalog.read()[name].pipeline]
    with flops.made_on(flops.META, torch.bfloat16):
        network = network_class(**PUBLISHED[name].transformer)
    assert sum(p.numel() for p in network.parameters()) == parameters
