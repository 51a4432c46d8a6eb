"""Sizes computed from a configuration equal those counted on the network."""

import pytest
import torch
from torch import nn

from tafs.models import architectures, catalog, flops
from tafs.models.architectures import PUBLISHED
from tafs.shapes import weights

SHAPES = ["shapes-flux", "shapes-sd3"]


@pytest.mark.parametrize("name", [*SHAPES, *PUBLISHED])
def test_a_size_is_that_of_the_network(name):
    model = catalog.read()[name]
    embedded = model.assets == "shapes"
    folder = weights.verify(name) if embedded else None
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


@pytest.mark.parametrize(
    "name, parameters", [("sd35-large", 8_056_627_520), ("flux-schnell", 11_891_178_560)]
)
def test_compared_models_have_their_published_numbers_of_parameters(name, parameters):
    network_class = flops.NETWORKS[catalog.read()[name].pipeline]
    with flops.made_on(flops.META, torch.bfloat16):
        network = network_class(**PUBLISHED[name].transformer)
    assert sum(p.numel() for p in network.parameters()) == parameters
