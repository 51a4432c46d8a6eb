"""The parts of the memory model equal what autograd saves on small networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import diffusers
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tafs.models import architectures, catalog, flops, memory_model
from tafs.models.architectures import FLUX2_KLEIN_BASE_4B, FLUX_DEV, PUBLISHED, SD35_MEDIUM
from tafs.models.memory_model import Setting
from tafs.shapes import weights

CPU = torch.device("cpu")
SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
}
VAE = architectures.vae((8, 16), layers=1, groups=4, latents=architectures.SD3_LATENTS)
NETWORKS = {
    "flux-dev": replace(
        FLUX_DEV,
        transformer={
            **FLUX_DEV.transformer,
            **SMALL,
            "num_layers": 2,
            "num_single_layers": 3,
            "axes_dims_rope": (4, 6, 6),
        },
        vae=VAE,
        tokens=300,
    ),
    "flux2-klein-base-4b": replace(
        FLUX2_KLEIN_BASE_4B,
        transformer={
            **FLUX2_KLEIN_BASE_4B.transformer,
            **{key: SMALL[key] for key in SMALL if key != "pooled_projection_dim"},
            "num_layers": 2,
            "num_single_layers": 3,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        vae=architectures.vae((8, 16), layers=1, groups=4, latents=architectures.FLUX2_LATENTS),
        tokens=300,
    ),
    "sd35-medium": replace(
        SD35_MEDIUM,
        transformer={
            **SD35_MEDIUM.transformer,
            **SMALL,
            "num_layers": 8,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 40,
            "dual_attention_layers": (0, 1, 2, 3),
        },
        vae=VAE,
        tokens=300,
    ),
}


def saved(work: Callable[[], object], *modules: torch.nn.Module) -> int:
    """Bytes of the tensors that the derivatives of `work` need, except for modules' own."""
    own = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    found: dict[int, torch.Tensor] = {}  # keeps them alive, so that addresses are not reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    kept = {place: tensor for place, tensor in found.items() if place not in own}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# The norm of FLUX's queries and keys saves a float32 copy in bfloat16 on CPUs, but not on GPUs.
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("flux-dev", torch.float32),
        ("flux2-klein-base-4b", torch.float32),
        ("sd35-medium", torch.float32),
        ("sd35-medium", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_holds_what_its_derivative_needs(name, dtype, checkpointing):
    architecture, model = NETWORKS[name], catalog.read()[name]
    common = {"resolution": 64, "lora_rank": 2}
    backbone = flops.build(architecture, model, dtype=dtype, device=CPU, **common)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    x, t = torch.randn(3, *backbone.latent_shape), torch.full((3,), 0.5)
    cond = backbone.encode(["x"] * 3)
    found = saved(lambda: backbone.velocity(x, t, cond), backbone.transformer)
    setting = Setting(
        **common,
        micro_batch=1,
        gradient_checkpointing=checkpointing,
        weight_bytes=dtype.itemsize,
        kept_images=3,
    )
    parts = memory_model.phases(architecture, model, setting)["sampling"]
    assert parts["kept graphs"] == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_decoder_saves_what_its_derivative_needs(checkpointing):
    config = architectures.vae((8, 16), layers=2, groups=4, latents=architectures.SD3_LATENTS)
    vae = diffusers.AutoencoderKL(**config).requires_grad_(False)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    x = torch.randn(1, 16, 32, 32, requires_grad=True)
    found = saved(lambda: vae.decode(x), vae)
    predicted = memory_model.decoder(config, resolution=64, conv_bytes=4)
    if checkpointing:
        shared = 4 * 8 * 64**2  # in float32 the last block's output is not copied for the norm
        assert predicted.given + predicted.ends - shared == pytest.approx(found, rel=0.08)
        return
    block = vae.decoder.up_blocks[-1]
    stream = torch.randn(1, 16, 64, 64, requires_grad=True)
    assert predicted.last == pytest.approx(saved(lambda: block(stream), vae), rel=0.05)


@pytest.mark.parametrize("activation, quick", [("gelu", False), ("quick_gelu", True)])
def test_a_vision_transformer_saves_what_its_derivative_needs(activation, quick):
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 6}
    tower |= {"num_attention_heads": 2, "hidden_act": activation}
    vision = {"image_size": 64, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower | vision)).eval()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    model.requires_grad_(False)
    found = saved(lambda: model.get_image_features(pixel_values=images), model)
    assert memory_model.tower(32, 6, 257, quick_gelu=quick) == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("name", ["shapes-flux", "flux-dev", "flux2-klein-base-4b"])
def test_the_autoencoder_has_the_parameters_of_its_configuration(name):
    model = catalog.read()[name]
    embedded = model.assets == "shapes"
    folder = weights.verify(name) if embedded else None
    config = (architectures.of_folder(folder, model) if folder else PUBLISHED[name]).vae
    with flops.made_on(flops.META, torch.float32):
        kind = "AutoencoderKLFlux2" if "flux2" in name else "AutoencoderKL"
        vae = getattr(diffusers, kind)(**config)
    assert memory_model.autoencoder_weights(config) == sum(p.numel() for p in vae.parameters())


def peak(name: str, **settings) -> dict[str, float]:
    common = {"resolution": 512, "lora_rank": 32, "micro_batch": 12, "gradient_checkpointing": True}
    found = memory_model.phases(PUBLISHED[name], catalog.read()[name], Setting(**common | settings))
    return {phase: sum(parts.values()) for phase, parts in found.items()}


def test_the_peak_is_that_of_the_phase_that_takes_most():
    found = memory_model.phases(
        PUBLISHED["flux-dev"], catalog.read()["flux-dev"], Setting(512, 32, 12, True)
    )
    assert memory_model.peak(found) == sum(found["scoring"].values())


def test_images_that_are_decoded_in_parts_take_the_memory_of_a_part():
    whole, part = peak("flux-dev"), peak("flux-dev", decoded=4)
    one = memory_model.decoder(PUBLISHED["flux-dev"].vae, 512).forward
    assert whole["scoring"] - part["scoring"] == pytest.approx(8 * one)
    rewarded = {"reward_activations": 0.8e9}
    whole, part = peak("flux-dev", **rewarded), peak("flux-dev", **rewarded, decoded=4)
    assert whole["update"] == part["update"]
    assert whole["reward gradients"] > part["reward gradients"] > part["update"]


def test_images_that_are_scored_ahead_are_decoded_beside_sampling():
    after, ahead = peak("flux-dev"), peak("flux-dev", score_ahead=True)
    decoded = 12 * memory_model.decoder(PUBLISHED["flux-dev"].vae, 512).forward
    assert ahead["sampling"] - after["sampling"] == pytest.approx(decoded)
    assert all(ahead[phase] == after[phase] for phase in after if phase != "sampling")


@pytest.mark.parametrize("name", ["flux-dev", "sd35-medium"])
def test_kept_graphs_take_memory_from_sampling_to_the_update(name):
    without = peak(name, trained_steps=3)
    kept = peak(name, trained_steps=3, kept_images=24)
    more = {phase: kept[phase] - without[phase] for phase in kept}
    assert more["encoding"] == 0
    assert more["sampling"] == more["scoring"] > more["update"] > 0
    # The update's own micro-batch is one of the 24 x 3 / 12.
    assert more["update"] == pytest.approx(more["sampling"] * 5 / 6)


@pytest.mark.parametrize("chosen, saved", [("int8", 1.0), ("nf4", 2 - 0.5 - 1 / 64)])
def test_quantised_weights_take_less_except_while_one_is_restored(chosen, saved):
    """In squares of its width, FLUX.2-klein has 5 blocks of 26 and 20 of 13; one layer has 9."""
    name, setting = "flux2-klein-base-4b", Setting(512, 32, 4, True)
    whole, quantized = (
        memory_model.phases(PUBLISHED[name], catalog.read()[name], one)["update"]
        for one in (setting, replace(setting, quantize=chosen))
    )
    assert whole["network"] - quantized["network"] == 390 * 3072**2 * saved
    restored = {"int8": 6, "nf4": 7}[chosen] * 9 * 3072**2
    assert (whole["restored weight"], quantized["restored weight"]) == (0, restored)
    same = set(whole) - {"network", "restored weight"}
    assert all(whole[part] == quantized[part] for part in same)


def test_rewards_that_are_differentiated_one_by_one_take_more():
    one_by_one = peak("flux-dev", reward_activations=0.8e9)["reward gradients"]
    together = peak("flux-dev", reward_activations=0.8e9, retained=False)
    assert one_by_one > together["reward gradients"] > together["update"]
    assert "reward gradients" not in peak("flux-dev")
