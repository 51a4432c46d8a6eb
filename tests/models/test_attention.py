"""Attention backends, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from support import tiny_pipelines
from support.checkpoints import PROMPTS, Checkpoint, noise_for

from tafs.models import Backbone, catalog
from tafs.models.attention import Attention

NAMES = get_args(Attention)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """A backend that a network has chosen is also diffusers' default from then on."""
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture(scope="module", params=["FluxPipeline", "Flux2KleinPipeline"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return Checkpoint(
        catalog.backbones()[request.param], tiny_pipelines.PIPELINES[request.param](folder)
    )


def gradients(backbone: Backbone) -> torch.Tensor:
    velocity = backbone.velocity(
        noise_for(backbone), torch.tensor([0.9, 0.4]), backbone.encode(PROMPTS)
    )
    velocity.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in backbone.lora_parameters().values()])


def test_all_names_are_those_of_diffusers():
    assert {*NAMES} < {backend.value for backend in AttentionBackendName}


def test_another_backend_computes_the_same_velocities_and_gradients(checkpoint, monkeypatch):
    used = []
    backends = attention_dispatch._AttentionBackendRegistry._backends
    inner = backends[AttentionBackendName._NATIVE_MATH]

    def counted(*given, **named):
        used.append(1)
        return inner(*given, **named)

    monkeypatch.setitem(backends, AttentionBackendName._NATIVE_MATH, counted)
    expected = gradients(checkpoint.adapted())
    assert not used
    found = gradients(checkpoint.adapted(attention_backend="_native_math"))
    assert used
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_a_backend_that_this_machine_lacks_is_one_line(checkpoint):
    with pytest.raises(
        ValueError, match="attention: 'flash' cannot be used here .*flash-attn"
    ) as e:
        checkpoint.load(attention_backend="flash")
    assert "\n" not in str(e.value)


def test_a_network_without_a_choice_says_so(tmp_path, capsys):
    folder = tiny_pipelines.sd3(tmp_path / "sd3")
    checkpoint = Checkpoint(catalog.backbones()["StableDiffusion3Pipeline"], folder)
    expected = gradients(checkpoint.adapted())
    assert capsys.readouterr().out == ""
    assert torch.equal(gradients(checkpoint.adapted(attention_backend="_native_math")), expected)
    said = "attention: the layers of a SD3Transformer2DModel take no backend; PyTorch chooses\n"
    assert capsys.readouterr().out == said
