"""The SD3 backbone on the shipped embedded model: diffusers' own pipeline is the reference."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tafs import sampling, seeding
from tafs.backbones.sd3 import SD3Backbone
from tafs.shapes import text, weights

PROMPTS = ["a red ring left of a blue square", "two crosses"]


def load() -> SD3Backbone:
    return SD3Backbone.load(
        weights.verify("shapes-sd3"), guidance=1.0, max_sequence_length=text.MAX_TOKENS
    )


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    return load()


@pytest.fixture
def adapted() -> SD3Backbone:
    """A model with an adapter that changes its output."""
    backbone = load()
    backbone.add_lora(4, 8, seeding.generator(0, "lora"))
    with torch.no_grad():
        for name, parameter in backbone.lora_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=seeding.generator(1, name))
    return backbone


def noise_for(backbone: SD3Backbone) -> torch.Tensor:
    generator = seeding.generator(0, "start")
    return torch.randn(len(PROMPTS), *backbone.latent_shape, generator=generator)


def our_images(backbone: SD3Backbone, steps: int = 6) -> torch.Tensor:
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


def their_images(pipeline: StableDiffusion3Pipeline, noise: torch.Tensor, guidance: float = 1.0):
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return pipeline(
        PROMPTS,
        num_inference_steps=6,
        sigmas=[1 - n / 6 for n in range(6)],
        guidance_scale=guidance,
        height=size,
        width=size,
        latents=noise,
        max_sequence_length=text.MAX_TOKENS,
        output_type="pt",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_equal_those_of_diffusers_own_pipeline(guidance):
    backbone = SD3Backbone.load(
        weights.verify("shapes-sd3"), guidance=guidance, max_sequence_length=text.MAX_TOKENS
    )
    theirs = their_images(backbone.pipeline, noise_for(backbone), guidance)
    torch.testing.assert_close(our_images(backbone), theirs, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_gives_identical_images_in_a_plain_pipeline(adapted, tmp_path):
    ours = our_images(adapted)
    file = tmp_path / "adapter.safetensors"
    adapted.save_adapter(file)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        weights.verify("shapes-sd3"), dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    base = their_images(pipeline, noise_for(adapted))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = their_images(pipeline, noise_for(adapted))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - base).abs().max() > 0.05


def test_a_saved_adapter_loads_into_the_backbone(adapted, tmp_path):
    file = tmp_path / "adapter.safetensors"
    adapted.save_adapter(file)
    fresh = load()
    fresh.load_adapter(file)
    torch.testing.assert_close(our_images(fresh), our_images(adapted), atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_without_its_adapter(adapted, backbone):
    with adapted.reference():
        torch.testing.assert_close(our_images(adapted), our_images(backbone))
    assert (our_images(adapted) - our_images(backbone)).abs().max() > 0.05


def test_a_fresh_adapter_changes_nothing(backbone):
    fresh = load()
    fresh.add_lora(4, 8, seeding.generator(0, "lora"))
    torch.testing.assert_close(our_images(fresh), our_images(backbone))


def test_the_same_seed_gives_the_same_adapter():
    parameters = []
    for _ in range(2):
        fresh = load()
        fresh.add_lora(4, 8, seeding.generator(3, "lora"))
        parameters.append(fresh.lora_parameters())
    assert all(torch.equal(parameters[0][n], parameters[1][n]) for n in parameters[0])


def test_only_the_adapter_is_trained(adapted):
    trained = {n for n, p in adapted.transformer.named_parameters() if p.requires_grad}
    assert trained == set(adapted.lora_parameters())


def test_every_word_of_the_world_is_one_token_in_both_tokenizers():
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    assert {len(clip(word).input_ids) for word in text.words()} == {3}
    assert {len(t5(word).input_ids) for word in text.words()} == {2}
    assert len({tuple(clip(word).input_ids) for word in text.words()}) == len(text.words())


def test_shipped_tokenizers_are_those_that_the_code_makes(backbone):
    for prompt in PROMPTS:
        shipped = backbone.pipeline.tokenizer(prompt).input_ids
        assert shipped == text.clip_tokenizer()(prompt).input_ids
        assert (
            backbone.pipeline.tokenizer_3(prompt).input_ids == text.t5_tokenizer()(prompt).input_ids
        )


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        SD3Backbone.load(tmp_path, guidance=1.0, max_sequence_length=8)


def test_an_altered_weight_file_is_refused_and_named(tmp_path):
    import shutil

    root = tmp_path / "weights"
    shutil.copytree(weights.ROOT / "vae", root / "vae")
    weights.write_manifest(root)
    assert weights.verify("vae", root) == root / "vae"
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: altered"):
        weights.verify("vae", root)
    file.unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: missing"):
        weights.verify("vae", root)
