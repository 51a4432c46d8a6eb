"""Quantised weights: close to the original, in fewer bytes, and never changed by an adapter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import EMBEDDED, embedded, our_images
from torch import nn
from torchao.quantization import NF4Tensor

from tafs.models import lora, quantization
from tafs.models.quantization import QuantizedLinear

# The largest root-mean-square difference of pixels in [0, 1]. Measured with shapes-sd3 and
# shapes-flux: 0.0013 and 0.0016 (int8), 0.014 and 0.024 (nf4); the images' own spread is 0.20.
DISTANCE = {"int8": 0.003, "nf4": 0.04}

formats = pytest.mark.parametrize("chosen", quantization.BYTES)


def torchao_restored(weight: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, NF4Tensor):
        return weight.to(torch.float32)
    return weight.dequantize().to(torch.float32)


def held(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a quantised weight consists of."""
    return (getattr(weight, name) for name in weight.__tensor_flatten__()[0])


@formats
def test_a_product_and_its_gradient_are_those_of_the_restored_weight(chosen):
    torch.manual_seed(0)
    [layer] = network = nn.Sequential(nn.Linear(256, 64)).requires_grad_(False)
    original = layer.weight.clone()
    quantization.quantize(network, chosen, "cpu")
    restored = torchao_restored(layer.weight)
    own = quantization.restored(quantization.parts(layer.weight), 256, torch.float32)
    assert torch.equal(own, restored)
    assert 0 < (restored - original).norm() < 0.1 * original.norm()
    x = torch.randn(3, 5, 256, requires_grad=True)
    expected = nn.functional.linear(x, restored, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    [own], [wanted] = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x), expected))
    torch.testing.assert_close(own, wanted)


@formats
def test_a_graph_holds_the_quantised_weight_alone(chosen):
    network = nn.Sequential(nn.Linear(512, 512)).bfloat16().requires_grad_(False)
    quantization.quantize(network, chosen, "cpu")
    size = sum(tensor.nbytes for tensor in held(network[0].weight))
    assert size / 512**2 == pytest.approx(quantization.BYTES[chosen], abs=0.01)
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(found.append, lambda kept: kept):
        network(torch.zeros(2, 512, dtype=torch.bfloat16, requires_grad=True))
    held_by_the_graph = {tensor.data_ptr() for tensor in found}
    parts = quantization.parts(network[0].weight)
    assert held_by_the_graph == {tensor.data_ptr() for tensor in parts}
    assert held_by_the_graph <= {tensor.data_ptr() for tensor in held(network[0].weight)}


@formats
@pytest.mark.parametrize("name", EMBEDDED)
def test_images_stay_close_and_layers_outside_the_blocks_are_not_touched(chosen, name):
    whole, backbone = embedded(name).load(), embedded(name).load(quantize=chosen)
    quantized = [m for m in backbone.transformer.modules() if isinstance(m, QuantizedLinear)]
    inside = [m for block in backbone.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    assert set(quantized) == set(inside)
    difference = (our_images(whole) - our_images(backbone)).square().mean().sqrt().item()
    assert 0 < difference < DISTANCE[chosen]


@formats
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_adapter_is_trained_saved_and_loaded_beside_quantised_weights(chosen, name, tmp_path):
    backbone = embedded(name).adapted(quantize=chosen)
    adapter = backbone.lora_parameters()
    before = [tensor.clone() for m in backbone.blocks for p in m.parameters() for tensor in _all(p)]
    images = our_images(backbone)
    cond, noise = backbone.encode(["a red ring"]), torch.randn(1, *backbone.latent_shape)
    backbone.velocity(noise, torch.ones(1), cond).square().sum().backward()
    assert {type(m) for m in backbone.transformer.modules() if hasattr(m, "lora_A")} == {
        lora.LoraLinear
    }
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.values())
    assert sum(p.grad.norm() for p in adapter.values()) > 0
    trained = {n for n, p in backbone.transformer.named_parameters() if p.grad is not None}
    assert trained == set(adapter)
    backbone.save_adapter(tmp_path / "adapter.safetensors")
    after = [tensor for m in backbone.blocks for p in m.parameters() for tensor in _all(p)]
    assert all(map(torch.equal, before, after))

    embedded(name).adapted().save_adapter(tmp_path / "whole.safetensors")
    saved, whole = (load_file(tmp_path / f"{n}.safetensors") for n in ("adapter", "whole"))
    assert saved.keys() == whole.keys() and all(torch.equal(saved[k], whole[k]) for k in whole)

    loaded = embedded(name).load(quantize=chosen)
    loaded.load_adapter(tmp_path / "adapter.safetensors")
    assert any(isinstance(m, QuantizedLinear) for m in loaded.transformer.modules())
    torch.testing.assert_close(our_images(loaded), images)


def _all(weight: torch.Tensor) -> list[torch.Tensor]:
    return list(held(weight)) if hasattr(weight, "__tensor_flatten__") else [weight]


@pytest.mark.parametrize("chosen, name", zip(quantization.BYTES, EMBEDDED, strict=True))
def test_compiled_blocks_with_quantised_weights_compute_the_same(chosen, name):
    """One of each kind: traced as for a GPU, and computed by the kernels that are not compiled."""
    found = []
    for compiled in (False, True):
        backbone = embedded(name).adapted(quantize=chosen)
        for block in (backbone.blocks[0], backbone.blocks[-1]) if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        cond, noise = backbone.encode(["a red ring"]), torch.ones(1, *backbone.latent_shape)
        with torch.no_grad():
            sampled = backbone.velocity(noise, torch.ones(1), cond)
        velocity = backbone.velocity(noise, torch.ones(1), cond)
        velocity.square().sum().backward()
        gradients = [p.grad for p in backbone.lora_parameters().values()]
        found.append([sampled, velocity.detach(), *gradients])
    torch.testing.assert_close(*found)
