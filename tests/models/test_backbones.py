"""The backbones on the embedded models: diffusers' own pipelines are the reference."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from tafs.common import seeding
from tafs.models import base, loading, sampling
from tafs.models.base import Backbone, Conditioning
from tafs.shapes import pretrain, text, weights
from tafs.shapes.scenes import IMAGE_SIZE

PROMPTS = ["a red ring left of a blue square", "two crosses"]


NAMES = ("shapes-sd3", "shapes-flux")


@cache
def folder(name: str) -> Path:
    """The shipped model, or an untrained one of its layout where none is shipped."""
    if (weights.ROOT / name).is_dir():
        return weights.verify(name)
    autoencoder = AutoencoderKL.from_pretrained(
        weights.verify("shapes-sd3") / "vae", local_files_only=True, dtype=torch.float32
    )
    torch.manual_seed(0)
    untrained = pretrain.BASES[name].build(autoencoder)
    nn.init.normal_(untrained.transformer.proj_out.weight, std=0.1)
    place = Path(tempfile.mkdtemp()) / name
    weights.save_pipeline(untrained.pipeline, place)
    return place


def load(name: str, guidance: float = 1.0) -> Backbone:
    return loading.load(
        folder(name),
        resolution=IMAGE_SIZE,
        guidance=guidance,
        max_sequence_length=text.MAX_TOKENS,
    )


@pytest.fixture(scope="module", params=NAMES)
def backbone(request) -> Backbone:
    return load(request.param)


@pytest.fixture
def adapted(backbone) -> Backbone:
    """A model with an adapter that changes its output."""
    fresh = load(name_of(backbone))
    fresh.add_lora(4, 8, seeding.generator(0, "lora"))
    with torch.no_grad():
        for name, parameter in fresh.lora_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=seeding.generator(1, name))
    return fresh


def name_of(backbone: Backbone) -> str:
    return {"SD3Backbone": "shapes-sd3", "FluxBackbone": "shapes-flux"}[type(backbone).__name__]


def noise_for(backbone: Backbone) -> torch.Tensor:
    generator = seeding.generator(0, "start")
    return torch.randn(len(PROMPTS), *backbone.latent_shape, generator=generator)


def our_images(backbone: Backbone, steps: int = 6) -> torch.Tensor:
    cond = backbone.encode(PROMPTS)
    with torch.no_grad():
        x_0 = sampling.integrate(
            lambda x, t: backbone.velocity(x, t, cond),
            noise_for(backbone),
            backbone.time_grid(steps),
            sampling.ode,
            torch.Generator(),
        )
        return backbone.decode(x_0)


def their_images(backbone: Backbone, pipeline: DiffusionPipeline, guidance: float = 1.0):
    latents = noise_for(backbone)
    if name_of(backbone) == "shapes-flux":
        latents = pipeline._pack_latents(latents, *latents.shape)
    return pipeline(
        PROMPTS,
        num_inference_steps=6,
        sigmas=[1 - n / 6 for n in range(6)],
        guidance_scale=guidance,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        latents=latents,
        max_sequence_length=text.MAX_TOKENS,
        output_type="pt",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_images_equal_those_of_diffusers_own_pipeline(name, guidance):
    backbone = load(name, guidance)
    theirs = their_images(backbone, backbone.pipeline, guidance)
    torch.testing.assert_close(our_images(backbone), theirs, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_gives_identical_images_in_a_plain_pipeline(adapted, tmp_path):
    ours = our_images(adapted)
    file = tmp_path / "adapter.safetensors"
    adapted.save_adapter(file)
    pipeline = DiffusionPipeline.from_pretrained(
        folder(name_of(adapted)), dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    base = their_images(adapted, pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = their_images(adapted, pipeline)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - base).abs().max() > 0.05


def test_a_saved_adapter_loads_into_the_backbone(adapted, tmp_path):
    file = tmp_path / "adapter.safetensors"
    adapted.save_adapter(file)
    fresh = load(name_of(adapted))
    fresh.load_adapter(file)
    torch.testing.assert_close(our_images(fresh), our_images(adapted), atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_without_its_adapter(adapted, backbone):
    with adapted.reference():
        torch.testing.assert_close(our_images(adapted), our_images(backbone))
    assert (our_images(adapted) - our_images(backbone)).abs().max() > 0.05


def test_a_fresh_adapter_changes_nothing(backbone):
    fresh = load(name_of(backbone))
    fresh.add_lora(4, 8, seeding.generator(0, "lora"))
    torch.testing.assert_close(our_images(fresh), our_images(backbone))


def test_the_same_seed_gives_the_same_adapter(backbone):
    parameters = []
    for _ in range(2):
        fresh = load(name_of(backbone))
        fresh.add_lora(4, 8, seeding.generator(3, "lora"))
        parameters.append(fresh.lora_parameters())
    assert all(torch.equal(parameters[0][n], parameters[1][n]) for n in parameters[0])


@pytest.fixture(scope="module", params=NAMES)
def guided(request) -> Backbone:
    """With classifier-free guidance where the architecture has it."""
    return load(request.param, guidance=3.0)


def same(a: Conditioning, b: Conditioning) -> bool:
    """Bit for bit."""
    return torch.equal(a.embeds, b.embeds) and torch.equal(a.pooled, b.pooled)


def test_a_prompt_has_the_same_conditioning_whatever_is_encoded_beside_it(guided):
    together = guided.encode(PROMPTS)
    fresh = load(name_of(guided), guidance=3.0)
    fresh.prepare(["a green cross", PROMPTS[1], "three rings"])
    alone = fresh.encode([PROMPTS[1]])
    assert same(alone, together[1:])
    if alone.negative is not None:
        assert same(alone.negative, together.negative[1:])


def test_conditioning_is_that_of_the_text_encoders(backbone):
    cond, theirs = backbone.encode(PROMPTS), backbone.embed(PROMPTS)
    torch.testing.assert_close(cond.embeds, theirs.embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cond.pooled, theirs.pooled, atol=1e-5, rtol=1e-5)
    assert not cond.embeds.requires_grad


def test_guidance_points_away_from_the_empty_prompt(guided):
    negative = guided.encode(PROMPTS).negative
    assert (negative is None) == (name_of(guided) == "shapes-flux")
    if negative is not None:
        assert same(negative, guided.encode(["", ""]))


def test_a_repeated_prompt_is_a_repeated_row(guided):
    cond = guided.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert same(cond, guided.encode(PROMPTS)[[1, 0, 1]])
    assert same(guided.encode(PROMPTS).repeat_interleave(2)[1:3], guided.encode(PROMPTS))


def test_a_prompt_is_encoded_once_while_there_is_room_for_it(monkeypatch):
    backbone, calls = load("shapes-sd3"), []
    backbone.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    backbone.encode(PROMPTS)
    backbone.encode(PROMPTS)
    backbone.prepare(PROMPTS[:1])
    backbone.encode(PROMPTS)
    assert len(calls) == 2
    monkeypatch.setattr(base, "KEPT_BYTES", 0)
    backbone.prepare(PROMPTS[:1])
    backbone.encode(PROMPTS[:1])
    assert len(calls) == 2
    backbone.encode(PROMPTS)
    assert len(calls) == 3
    backbone.prepare([])
    backbone.encode(PROMPTS)
    assert len(calls) == 5


def test_the_text_encoders_can_be_trained():
    backbone = load("shapes-sd3")
    weight = backbone.pipeline.text_encoder.text_projection.weight.requires_grad_()
    backbone.embed(PROMPTS).pooled.sum().backward()
    assert weight.grad.abs().max() > 0


def test_a_resolution_that_splits_a_patch_is_refused():
    for name, patch in (("shapes-sd3", 4), ("shapes-flux", 8)):
        with pytest.raises(ValueError, match=f"resolution: 25 is not a multiple of {patch}"):
            loading.load(folder(name), resolution=25, guidance=1.0, max_sequence_length=10)


def test_only_the_adapter_is_trained(adapted):
    trained = {n for n, p in adapted.transformer.named_parameters() if p.requires_grad}
    assert trained == set(adapted.lora_parameters())


def test_every_word_of_the_world_is_one_token_in_both_tokenizers():
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    assert {len(clip(word).input_ids) for word in text.words()} == {3}
    assert {len(t5(word).input_ids) for word in text.words()} == {2}
    assert len({tuple(clip(word).input_ids) for word in text.words()}) == len(text.words())


def test_shipped_tokenizers_are_those_that_the_code_makes(backbone):
    components = backbone.pipeline.components
    t5 = components.get("tokenizer_3") or components["tokenizer_2"]
    for prompt in PROMPTS:
        assert components["tokenizer"](prompt).input_ids == text.clip_tokenizer()(prompt).input_ids
        assert t5(prompt).input_ids == text.t5_tokenizer()(prompt).input_ids


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        loading.load(tmp_path)


def test_a_pipeline_of_another_kind_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError, match="cannot drive a 'SanaPipeline'.*FluxPipeline"):
        loading.load(tmp_path)


def test_an_altered_weight_file_is_refused_and_named(tmp_path):
    import shutil

    root = tmp_path / "weights"
    shutil.copytree(weights.ROOT / "clip", root / "clip")
    weights.write_manifest(root)
    assert weights.verify("clip", root) == root / "clip"
    file = root / "clip" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: altered"):
        weights.verify("clip", root)
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        weights.verify("clip", root)
