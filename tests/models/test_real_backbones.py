"""The backbones on tiny random checkpoints in the layouts of FLUX.1-dev and SD3.5-M.

Diffusers' own pipelines are the reference.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from support import tiny_pipelines
from torch import Tensor

from tafs.common import seeding
from tafs.models import loading, sampling
from tafs.models.base import ATTENTION, Backbone

PROMPTS = ["a red cat", "two dogs and a blue bench"]
STEPS = 4
GUIDANCE = {"flux": 3.5, "sd3": 4.5}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass(frozen=True)
class Checkpoint:
    kind: str
    folder: Path

    def load(self, **settings) -> Backbone:
        defaults = {
            "resolution": 64,
            "guidance": GUIDANCE[self.kind],
            "max_sequence_length": 16,
        }
        return loading.load(self.folder, **(defaults | settings))

    def adapted(self, **settings) -> Backbone:
        """With an adapter that changes the network's output."""
        backbone = self.load(**settings)
        backbone.add_lora(4, 8, seeding.generator(0, "lora"))
        with torch.no_grad():
            for name, parameter in backbone.lora_parameters().items():
                if "lora_B" in name:
                    values = torch.empty(parameter.shape)
                    parameter.copy_(values.normal_(std=0.2, generator=seeding.generator(1, name)))
        return backbone

    def pipeline(self) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    write = {"flux": tiny_pipelines.flux, "sd3": tiny_pipelines.sd3}
    return {kind: Checkpoint(kind, write[kind](tmp_path_factory.mktemp(kind))) for kind in write}


@pytest.fixture(params=["flux", "sd3"])
def checkpoint(request, checkpoints) -> Checkpoint:
    return checkpoints[request.param]


def noise_for(backbone: Backbone) -> Tensor:
    shape = (len(PROMPTS), *backbone.latent_shape)
    return torch.randn(shape, generator=seeding.generator(0, "start"))


@torch.no_grad()
def our_images(backbone: Backbone) -> Tensor:
    cond = backbone.encode(PROMPTS)
    x_0 = sampling.integrate(
        lambda x, t: backbone.velocity(x, t, cond),
        noise_for(backbone),
        backbone.time_grid(STEPS),
        sampling.ode,
        torch.Generator(),
    )
    return backbone.decode(x_0)


def their_images(backbone: Backbone, pipeline: DiffusionPipeline) -> Tensor:
    latents = noise_for(backbone)
    if isinstance(pipeline.transformer, FluxTransformer2DModel):
        inputs = {"latents": pipeline._pack_latents(latents, *latents.shape)}
    else:
        inputs = {"latents": latents, "sigmas": [1 - n / STEPS for n in range(STEPS)]}
    return pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=backbone.guidance,
        height=backbone.resolution,
        width=backbone.resolution,
        max_sequence_length=backbone.max_sequence_length,
        output_type="pt",
        **inputs,
    ).images


# -- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [48, 64])
def test_images_equal_those_of_diffusers_own_pipeline(checkpoint, resolution):
    backbone = checkpoint.load(resolution=resolution)
    ours = our_images(backbone)
    assert ours.shape == (len(PROMPTS), 3, resolution, resolution)
    torch.testing.assert_close(
        ours, their_images(backbone, checkpoint.pipeline()), atol=1e-5, rtol=0
    )
    assert ours.std() > 0.01


def test_images_depend_on_the_guidance(checkpoint):
    without = checkpoint.load(guidance=1.0)
    assert without.encode(PROMPTS).negative is None
    torch.testing.assert_close(
        our_images(without), their_images(without, checkpoint.pipeline()), atol=1e-5, rtol=0
    )
    assert (our_images(without) - our_images(checkpoint.load())).abs().max() > 1e-4


def test_a_resolution_that_splits_a_patch_is_refused(checkpoint):
    with pytest.raises(ValueError, match="resolution: 56 is not a multiple of 16"):
        checkpoint.load(resolution=56)


@pytest.mark.parametrize(
    ("resolution", "mu"),
    [(256, 0.5), (512, 0.5 + 0.65 * 768 / 3840), (1024, 1.15)],
)
def test_flux_shifts_its_grid_by_the_number_of_image_tokens(checkpoints, resolution, mu):
    grid = checkpoints["flux"].load(resolution=resolution).time_grid(4)
    expected = [math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(grid, torch.tensor(expected))


def test_sd35_shifts_its_grid_by_three_at_every_resolution(checkpoints):
    for resolution in (64, 1024):
        grid = checkpoints["sd3"].load(resolution=resolution).time_grid(4)
        torch.testing.assert_close(grid, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


# -- prompts -----------------------------------------------------------------------------------


def test_the_text_encoders_run_once_for_a_prompt(checkpoint):
    backbone = checkpoint.load()
    calls = []
    backbone.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    backbone.prepare(PROMPTS)
    guided = checkpoint.kind == "sd3"
    assert len(calls) == len(PROMPTS) + guided
    backbone.encode(PROMPTS)
    backbone.encode([PROMPTS[0], PROMPTS[0]])
    assert len(calls) == len(PROMPTS) + guided


@on_a_gpu
def test_only_network_and_autoencoder_stay_on_the_gpu(checkpoint):
    backbone = checkpoint.load(device="cuda", dtype=torch.bfloat16)
    cond = backbone.encode(PROMPTS)
    where = {n: m.device.type for n, m in backbone.pipeline.components.items() if "coder" in n}
    encoders = {name: "cpu" for name in where if name.startswith("text_encoder")}
    assert backbone.device.type == "cuda"
    assert {n: d for n, d in where.items() if n.startswith("text_encoder")} == encoders
    assert backbone.pipeline.vae.device.type == "cuda"
    assert cond.embeds.is_cuda and cond.pooled.is_cuda
    assert all(kept.embeds.is_pinned() for kept in backbone._kept.values())


# -- precision ---------------------------------------------------------------------------------


def test_a_bfloat16_network_takes_and_gives_float32(checkpoint):
    backbone, reference = (
        checkpoint.load(dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert backbone.transformer.dtype == torch.bfloat16
    assert backbone.pipeline.text_encoder.dtype == torch.bfloat16
    assert backbone.pipeline.vae.dtype == torch.float32
    x_t, t = noise_for(backbone), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        v, exact = (b.velocity(x_t, t, b.encode(PROMPTS)) for b in (backbone, reference))
    assert v.dtype == torch.float32
    assert (v - exact).norm() < 0.05 * exact.norm()


def test_the_autoencoder_has_a_precision_of_its_own(checkpoint):
    backbone, reference = checkpoint.load(vae_dtype=torch.bfloat16), checkpoint.load()
    assert backbone.transformer.dtype == torch.float32
    with torch.no_grad():
        coarse, fine = (b.decode(noise_for(b)) for b in (backbone, reference))
        mixed = reference.decode(noise_for(reference), torch.bfloat16)
    assert coarse.dtype == mixed.dtype == torch.float32
    for images in (coarse, mixed):
        assert 0 < (images - fine).abs().max() < 0.1


def test_gradients_reach_a_float32_adapter_through_a_bfloat16_network(checkpoint):
    # 1000 times this guidance is a bfloat16 number; FLUX.1 embeds it after rounding it to one.
    exact, coarse = (
        gradients(checkpoint.adapted(dtype=dtype, guidance=4.0))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {gradient.dtype for gradient in coarse.values()} == {torch.float32}
    cosine = torch.cosine_similarity(flat(exact), flat(coarse), dim=0)
    assert cosine > 0.98


# -- gradients ---------------------------------------------------------------------------------


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    """Of the adapter, through network and decoder."""
    x_t, t = noise_for(backbone), torch.full((len(PROMPTS),), 0.6)
    v = backbone.velocity(x_t, t, backbone.encode(PROMPTS))
    backbone.decode(sampling.x0_estimate(x_t, v, t)).square().sum().backward()
    return {name: p.grad for name, p in backbone.lora_parameters().items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_checkpointing_changes_no_gradient(checkpoint):
    kept, recomputed = (
        gradients(checkpoint.adapted(gradient_checkpointing=choice)) for choice in (False, True)
    )
    assert flat(kept).norm() > 0
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("choice", [False, True])
def test_blocks_run_twice_only_for_gradients_and_only_with_checkpointing(checkpoint, choice):
    backbone = checkpoint.adapted(gradient_checkpointing=choice)
    calls = Counter()
    for block in (backbone.blocks[0], backbone.pipeline.vae.decoder.mid_block):
        block.register_forward_pre_hook(lambda module, _: calls.update([type(module)]))
    our_images(backbone)
    passes = STEPS + 1  # one of them decodes
    assert sum(calls.values()) == passes
    gradients(backbone)
    assert sum(calls.values()) == passes + 2 * (2 if choice else 1)


def test_checkpointing_leaves_the_forward_pass_as_it_is(checkpoint):
    """The ratio of new to old densities starts at exactly 1."""
    backbone = checkpoint.adapted(gradient_checkpointing=True)
    cond, x_t, t = backbone.encode(PROMPTS), noise_for(backbone), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        sampled = backbone.velocity(x_t, t, cond)
    assert torch.equal(backbone.velocity(x_t, t, cond), sampled)


def test_every_block_is_compiled_on_request(checkpoint):
    for choice in (False, True):
        blocks = checkpoint.load(compile=choice).blocks
        assert {block._compiled_call_impl is not None for block in blocks} == {choice}


@on_a_gpu
def test_compiled_blocks_compute_the_same(checkpoint):
    velocities = []
    for choice in (False, True):
        backbone = checkpoint.load(device="cuda", compile=choice)
        x_t, t = noise_for(backbone).cuda(), torch.tensor([0.9, 0.4]).cuda()
        with torch.no_grad():
            velocities.append(backbone.velocity(x_t, t, backbone.encode(PROMPTS)))
    torch.testing.assert_close(*velocities, atol=1e-3, rtol=1e-3)


# -- adapters ----------------------------------------------------------------------------------


def test_a_saved_adapter_gives_identical_images_in_a_plain_pipeline(checkpoint, tmp_path):
    backbone = checkpoint.adapted()
    file = tmp_path / "adapter.safetensors"
    backbone.save_adapter(file)
    pipeline = checkpoint.pipeline()
    base = their_images(backbone, pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 8)
    theirs = their_images(backbone, pipeline)
    torch.testing.assert_close(our_images(backbone), theirs, atol=1e-5, rtol=0)
    assert (theirs - base).abs().max() > 1e-3


def test_a_bfloat16_network_samples_with_the_adapter_that_it_was_trained_with(checkpoint, tmp_path):
    trained = checkpoint.adapted(dtype=torch.bfloat16)
    file = tmp_path / "adapter.safetensors"
    trained.save_adapter(file)
    loaded = checkpoint.load(dtype=torch.bfloat16)
    loaded.load_adapter(file)
    assert {p.dtype for p in loaded.lora_parameters().values()} == {torch.float32}
    assert torch.equal(our_images(loaded), our_images(trained))


@on_a_gpu
def test_an_adapter_starts_equal_on_every_device(checkpoint):
    adapters = []
    for device in ("cpu", "cuda"):
        backbone = checkpoint.load(device=device, dtype=torch.bfloat16)
        backbone.add_lora(4, 8, seeding.generator(0, "lora"))
        adapters.append({n: p.detach().cpu() for n, p in backbone.lora_parameters().items()})
    assert all(torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[0])


# Both as published, but for the size of SD3.5-M's table of positions: 384 there.
FLUX_DEV = {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38}
SD35_MEDIUM = {
    "num_layers": 24,
    "dual_attention_layers": tuple(range(13)),
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 64,
    "qk_norm": "rms_norm",
}


@pytest.mark.parametrize(
    ("architecture", "config", "counts"),
    [
        (FluxTransformer2DModel, FLUX_DEV, {"own": 57, "text": 19, "to_out": 19, "to_add_out": 19}),
        (
            SD3Transformer2DModel,
            SD35_MEDIUM,
            {"own": 24, "text": 24, "to_out": 24, "to_add_out": 23},
        ),
    ],
    ids=["FLUX.1-dev", "SD3.5-M"],
)
def test_every_named_projection_of_the_published_architectures_is_adapted(
    architecture, config, counts
):
    with torch.device("meta"):
        network = architecture(**config)
        network.add_adapter(LoraConfig(r=4, target_modules=list(ATTENTION)))
    adapted = [name for name, _ in network.named_modules() if name.endswith("lora_A.default")]
    found = Counter(next(t for t in ATTENTION if f".{t}." in name) for name in adapted)
    expected = {f"attn.{name}": counts["own"] for name in ("to_q", "to_k", "to_v")}
    expected |= {f"attn.add_{name}_proj": counts["text"] for name in "qkv"}
    expected |= {"attn.to_out.0": counts["to_out"], "attn.to_add_out": counts["to_add_out"]}
    assert found == expected
    assert not any("attn2" in name for name in adapted)
