"""The layer of trained adapters computes what peft's layer computes."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from tafs.models import lora

SHAPE = (3, 5, 16)  # of the layer's input


def adapted(dtype: torch.dtype = torch.float32, *, ours: bool = True) -> nn.Module:
    """A frozen layer with a float32 adapter of rank 4 and alpha 6, always with the same values."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 24)).to(dtype).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["0"]), network)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) / 4
        parameter.data = values.to(torch.float32 if "lora_" in name else dtype)
    if ours:
        lora.install(network)
    return network


def outcome(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the adapter."""
    x = x.clone().requires_grad_()
    y = network(x)
    y.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert len(gradients) == 2
    return [y.detach(), x.grad, *gradients]


def test_output_and_gradients_equal_those_of_peft():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    network = adapted()
    assert type(network[0]) is lora.LoraLinear
    assert type(adapted(ours=False)[0]) is Linear
    for ours, theirs in zip(outcome(network, x), outcome(adapted(ours=False), x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_output_has_the_same_bits_with_and_without_gradients():
    x, network = torch.randn(SHAPE), adapted()
    with torch.no_grad():
        expected = network(x)
    assert torch.equal(network(x), expected)


def test_a_switched_off_adapter_leaves_the_layer_alone():
    x, network = torch.randn(SHAPE), adapted()
    network[0].enable_adapters(False)
    assert torch.equal(network(x), network[0].base_layer(x))
    network[0].enable_adapters(True)
    assert not torch.equal(network(x), network[0].base_layer(x))


def test_a_merged_adapter_counts_once():
    x, network = torch.randn(SHAPE), adapted()
    before = network(x)
    network[0].merge()
    torch.testing.assert_close(network(x), before)


def test_a_bfloat16_layer_keeps_the_adapters_precision():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    network = adapted(torch.bfloat16)
    y, *_, a, b = outcome(network, x.bfloat16())
    assert (y.dtype, a.dtype, b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact, *_, exact_a, exact_b = outcome(adapted(ours=False), x)
    rounding = 2 * torch.finfo(torch.bfloat16).eps
    for found, expected in ((y.float(), exact), (a, exact_a), (b, exact_b)):
        assert (found - expected).norm() < rounding * expected.norm()


@pytest.mark.parametrize("batch", [(2,), (2, 3, 4)])
def test_any_number_of_batch_dimensions(batch):
    assert adapted()(torch.randn(*batch, 16)).shape == (*batch, 24)
