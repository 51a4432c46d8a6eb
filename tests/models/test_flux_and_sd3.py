"""FLUX.1, FLUX.2 and Stable Diffusion 3.5: time grids, resolutions and adapted layers."""

import math
from collections import Counter

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from peft import LoraConfig
from support import tiny_pipelines
from support.checkpoints import Checkpoint, our_images, their_images

from tafs.models import ATTENTION
from tafs.models.architectures import FLUX_DEV, SD35_MEDIUM
from tafs.models.plugins.flux import FluxBackbone
from tafs.models.plugins.flux2_klein import Flux2KleinBackbone
from tafs.models.plugins.sd3 import SD3Backbone


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Checkpoint:
    return Checkpoint(FluxBackbone, tiny_pipelines.flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="module")
def flux2(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("flux2")
    return Checkpoint(Flux2KleinBackbone, tiny_pipelines.flux2_klein(folder))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Checkpoint:
    return Checkpoint(SD3Backbone, tiny_pipelines.sd3(tmp_path_factory.mktemp("sd3")))


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3"])
def test_images_equal_those_of_diffusers_at_an_odd_number_of_patches(name, request):
    checkpoint = request.getfixturevalue(name)
    backbone = checkpoint.load(resolution=48)
    theirs = their_images(backbone, checkpoint.pipeline())
    torch.testing.assert_close(our_images(backbone), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("resolution", "mu"),
    [(256, 0.5), (512, 0.5 + 0.65 * 768 / 3840), (1024, 1.15)],
)
def test_flux_shifts_its_grid_by_the_number_of_image_tokens(flux, resolution, mu):
    grid = flux.load(resolution=resolution).time_grid(4)
    expected = [math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(grid, torch.tensor(expected))


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("resolution", [512, 1104])
def test_flux2_shifts_its_grid_by_the_numbers_of_image_tokens_and_steps(flux2, resolution, steps):
    backbone = flux2.load(resolution=resolution)
    scheduler = backbone.pipeline.scheduler
    mu = compute_empirical_mu((resolution // 16) ** 2, steps)
    scheduler.set_timesteps(sigmas=[1 - n / steps for n in range(steps)], mu=mu)
    torch.testing.assert_close(backbone.time_grid(steps), scheduler.sigmas)


def test_flux2_without_dynamic_shifting_has_the_grid_of_the_schedulers_shift(flux2):
    backbone = flux2.load()
    backbone.pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
    torch.testing.assert_close(backbone.time_grid(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_a_flux2_that_is_distilled_for_few_steps_is_not_guided(flux2):
    backbone = flux2.load()
    assert backbone.negative_prompt == ""
    backbone.pipeline.register_to_config(is_distilled=True)
    assert backbone.negative_prompt is None


def test_flux2_adapts_all_projections_of_attention_and_no_other_layer(flux2):
    """A single block's two products contain its feed-forward layer."""
    adapted = {
        name.removesuffix(".lora_A.default")
        for name, _ in flux2.adapted().transformer.named_modules()
        if name.endswith("lora_A.default")
    }
    double = {f"transformer_blocks.0.{name}" for name in ATTENTION}
    single = {
        f"single_transformer_blocks.{number}.attn.{name}"
        for number in (0, 1)
        for name in ("to_qkv_mlp_proj", "to_out")
    }
    assert adapted == double | single


def test_sd35_shifts_its_grid_by_three_at_all_resolutions(sd3):
    for resolution in (64, 1024):
        grid = sd3.load(resolution=resolution).time_grid(4)
        torch.testing.assert_close(grid, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


@pytest.mark.parametrize(
    ("network_class", "architecture", "own", "text", "to_out", "to_add_out"),
    [
        (FluxTransformer2DModel, FLUX_DEV, 57, 19, 19, 19),
        (SD3Transformer2DModel, SD35_MEDIUM, 24, 24, 24, 23),
    ],
    ids=["FLUX.1-dev", "SD3.5-M"],
)
def test_all_named_projections_of_the_published_architectures_are_adapted(
    network_class, architecture, own, text, to_out, to_add_out
):
    with torch.device("meta"):
        network = network_class(**architecture.transformer)
        network.add_adapter(LoraConfig(r=4, target_modules=list(ATTENTION)))
    adapted = [name for name, _ in network.named_modules() if name.endswith("lora_A.default")]
    found = Counter(next(t for t in ATTENTION if f".{t}." in name) for name in adapted)
    expected = {f"attn.to_{name}": own for name in "qkv"}
    expected |= {f"attn.add_{name}_proj": text for name in "qkv"}
    expected |= {"attn.to_out.0": to_out, "attn.to_add_out": to_add_out}
    assert found == expected
    assert not any("attn2" in name for name in adapted)
