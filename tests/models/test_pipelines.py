"""The evaluation-only models: models.yaml, and every entry on a tiny checkpoint of its layout."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support import tiny_pipelines

from tafs.common import seeding
from tafs.common.yaml_files import ConfigError
from tafs.models import catalog, pipelines

MODELS = {name: model for name, model in catalog.read().items() if model.assets == "hub"}
PROMPTS = ["a photo of a bench", "a photo of two clocks"]
STEPS = 4  # at most: a tiny model's images show nothing more after forty
# HiDream's pipeline draws at its own resolution only.
RESOLUTION = {"HiDreamImagePipeline": 1024}
SHARDED = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"
CLIP_TOKENIZER = {
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
}
T5_TOKENIZER = {
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of every resource a tiny folder."""
    root = tmp_path_factory.mktemp("resources")
    return {name: write(root / name) for name, write in tiny_pipelines.RESOURCES.items()}


def generators(*seeds: int) -> list[torch.Generator]:
    return [seeding.generator(seed, "start") for seed in seeds]


def load(name: str, folders, resolution: int = 64) -> pipelines.ReferencePipeline:
    model = MODELS[name]
    shortened = model.model_copy(update={"steps": min(model.steps, STEPS)})
    return pipelines.ReferencePipeline.load(
        shortened, folders, resolution=resolution, dtype=torch.float32
    )


# -- models.yaml -----------------------------------------------------------------------------------


def test_the_models_are_those_of_table_1():
    found = {model.title: model.steps for model in MODELS.values()}
    assert found == {
        "SD3.5-Medium": 40,
        "SD3.5-Large": 28,
        "FLUX.1-dev": 28,
        "SANA-1.5 1.6B": 20,
        "HiDream-I1-Full": 50,
        "SD3.5-Large-Turbo": 4,
        "FLUX.1-schnell": 4,
        "Flux-Turbo-Alpha": 4,
        "Hyper-Flux": 8,
        "SANA-Sprint 1.6B": 4,
        "HiDream-I1-Fast": 16,
    }


def test_the_models_need_known_resources_only():
    needed = {name for model in MODELS.values() for name in model.resources}
    assert needed == set(tiny_pipelines.RESOURCES)
    assert MODELS["hyper-flux"].resources == ("flux-dev", "hyper-flux")
    assert MODELS["hidream-fast"].resources == ("hidream-fast", "llama-3.1-8b-instruct")


def changed(tmp_path: Path, **changes) -> Path:
    """models.yaml with only FLUX.1-dev in it, changed; None removes a key."""
    entry = yaml.safe_load(catalog.FILE.read_text())["flux-turbo-alpha"] | changes
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump({"flux": {k: v for k, v in entry.items() if v is not None}}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidence": 1.0}, "unknown key 'flux.guidence'; did you mean 'guidance'"),
        (
            {"lora": {"resource": "a", "file": "b.safetensors", "scales": 1.0}},
            "unknown key 'flux.lora.scales'; did you mean 'scale'",
        ),
        ({"pipeline": "StableDiffusionPipeline"}, "flux.pipeline: .*'FluxPipeline'"),
        ({"steps": None}, "missing key 'flux.steps'"),
        ({"steps": 0}, "flux.steps: .*greater than or equal to 1"),
        ({"guidance": -1}, "flux.guidance: "),
        ({"resource": "../flux"}, "flux.resource: "),
        ({"lora": {"resource": "a", "file": "../b.safetensors", "scale": 1}}, "flux.lora.file: "),
        ({"lora": {"resource": "a", "file": "b.bin", "scale": 1}}, "flux.lora.file: "),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        catalog.read(changed(tmp_path, **changes))
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith(f"{tmp_path / 'models.yaml'}: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="models.yaml: cannot be read"):
        catalog.read(tmp_path / "models.yaml")


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_draws_images_that_depend_on_prompt_and_generator_alone(name, folders):
    size = RESOLUTION.get(MODELS[name].pipeline, 64)
    loaded = load(name, folders, size)
    images = loaded.generate(PROMPTS, generators(0, 1))
    assert images.shape == (2, 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std() > 0.01
    alone = loaded.generate(PROMPTS[1:], generators(1))
    torch.testing.assert_close(alone, images[1:], atol=2e-3, rtol=0)
    other = loaded.generate(PROMPTS[1:], generators(2))
    assert (other - alone).abs().max() > 0.01


@pytest.mark.parametrize("name", ["flux-schnell", "sd35-medium"])
def test_images_are_those_of_the_plain_pipeline(name, folders):
    model = MODELS[name]
    pipeline = DiffusionPipeline.from_pretrained(
        folders[name], dtype=torch.float32, local_files_only=True
    )
    plain = pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=model.guidance,
        max_sequence_length=model.max_sequence_length,
        generator=generators(0, 1),
        output_type="pt",
    ).images
    torch.testing.assert_close(load(name, folders).generate(PROMPTS, generators(0, 1)), plain)


def test_a_model_can_be_sampled_at_another_number_of_steps(folders):
    loaded = load("flux-schnell", folders)
    own, two = (loaded.generate(PROMPTS, generators(0, 1), steps) for steps in (None, 2))
    torch.testing.assert_close(loaded.generate(PROMPTS, generators(0, 1), STEPS), own)
    assert (own - two).abs().max() > 0.01


@pytest.mark.parametrize("name", ["flux-turbo-alpha", "hyper-flux"])
def test_an_adapter_is_merged_at_its_scale(name, folders):
    model = MODELS[name]
    base = load("flux-dev", folders).pipeline.transformer.state_dict()
    merged = load(name, folders).pipeline.transformer.state_dict()
    assert set(merged) == set(base)
    adapter = load_file(folders[model.lora.resource] / model.lora.file)
    layers = {key.rsplit(".", 2)[0] for key in adapter}
    assert layers
    for layer in layers:
        down, up = (adapter[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        weight = f"{layer.removeprefix('transformer.')}.weight"
        expected = base[weight] + model.lora.scale * up @ down
        torch.testing.assert_close(merged[weight], expected, atol=1e-5, rtol=1e-5)


def test_weights_are_read_in_the_asked_precision(folders):
    loaded = pipelines.ReferencePipeline.load(MODELS["hidream-fast"], folders, resolution=1024)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3", "text_encoder_4"):
        assert loaded.pipeline.components[name].dtype == torch.bfloat16


def test_another_resolution_than_asked_is_refused(folders):
    with pytest.raises(ValueError, match="HiDream-I1-Fast draws 1024 x 1024 where 512 is asked"):
        load("hidream-fast", folders, 512).generate(PROMPTS[:1], generators(0))


def test_prompts_and_generators_must_be_of_one_number(folders):
    with pytest.raises(ValueError, match="2 prompts and 1 generators"):
        load("flux-schnell", folders).generate(PROMPTS, generators(0))


# -- what cannot be loaded -------------------------------------------------------------------------


def test_a_missing_resource_is_named(folders):
    with pytest.raises(FileNotFoundError, match="llama-3.1-8b-instruct: HiDream-I1-Full needs"):
        only = {"hidream-full": folders["hidream-full"]}
        pipelines.ReferencePipeline.load(MODELS["hidream-full"], only, resolution=1024)


def test_a_folder_of_another_pipeline_is_named(folders):
    with pytest.raises(ValueError, match="'StableDiffusion3Pipeline'.*'FluxPipeline'"):
        other = {"flux-dev": folders["sd35-medium"]}
        pipelines.ReferencePipeline.load(MODELS["flux-dev"], other, resolution=64)


@pytest.mark.parametrize(
    ("name", "resource", "message"),
    [
        ("flux-dev", "flux-dev", "model_index.json: not found"),
        ("hyper-flux", "hyper-flux", "Hyper-FLUX.*safetensors: no such adapter"),
        ("hidream-fast", "llama-3.1-8b-instruct", "config.json: not found"),
    ],
)
def test_an_empty_folder_is_named(folders, tmp_path, name, resource, message):
    with pytest.raises(FileNotFoundError, match=message):
        pipelines.ReferencePipeline.load(
            MODELS[name], {**folders, resource: tmp_path}, resolution=64
        )


@pytest.mark.parametrize("argument", ["intermediate_timesteps", "height"])
def test_an_argument_that_the_pipeline_does_not_take_is_named(folders, argument):
    model = MODELS["flux-dev"].model_copy(update={"arguments": {argument: None}})
    with pytest.raises(ValueError, match=f"arguments: '{argument}'.*FluxPipeline"):
        pipelines.ReferencePipeline.load(model, folders, resolution=64)


# -- the tiny checkpoints' layouts -----------------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def config(folder: Path, part: str) -> dict:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads((folder / part / name).read_text())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("flux-dev", 536),
        ("sd35-medium", 706),
        ("sana-1.5", 401),
        ("sana-sprint", 392),
        ("hidream-fast", 836),
    ],
)
def test_model_index_has_as_many_bytes_as_the_published_one(folders, name, size):
    assert (folders[name] / "model_index.json").stat().st_size == size


def test_flux_is_laid_out_as_flux_1_dev(folders):
    folder = folders["flux-dev"]
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert files(folder / "transformer") == {
        "config.json",
        index,
        *(SHARDED.format(n, 3) for n in (1, 2, 3)),
    }
    assert files(folder / "text_encoder") == {"config.json", "model.safetensors"}
    assert files(folder / "text_encoder_2") == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert files(folder / "vae") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files(folder / "tokenizer") == CLIP_TOKENIZER
    assert files(folder / "tokenizer_2") == T5_TOKENIZER
    transformer = config(folder, "transformer")
    published = {"guidance_embeds": True, "in_channels": 64, "patch_size": 1}
    assert published.items() <= transformer.items()
    assert {"attention_head_dim", "joint_attention_dim", "num_single_layers"} < set(transformer)
    published = {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }
    assert published.items() <= config(folder, "scheduler").items()
    published = {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    assert published.items() <= config(folder, "vae").items()


def test_schnell_has_no_guidance_and_no_shift(folders):
    folder = folders["flux-schnell"]
    assert config(folder, "transformer")["guidance_embeds"] is False
    published = {"shift": 1.0, "use_dynamic_shifting": False}
    assert published.items() <= config(folder, "scheduler").items()


def test_sd3_is_laid_out_as_sd35_medium(folders):
    folder = folders["sd35-medium"]
    assert files(folder / "transformer") == {"config.json", "diffusion_pytorch_model.safetensors"}
    for name in ("text_encoder", "text_encoder_2"):
        assert files(folder / name) == {
            "config.json",
            "model.fp16.safetensors",
            "model.safetensors",
        }
    assert files(folder / "text_encoder_3") == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "model.safetensors.index.json",
    }
    assert files(folder / "tokenizer") == files(folder / "tokenizer_2") == CLIP_TOKENIZER
    assert files(folder / "tokenizer_3") == T5_TOKENIZER
    transformer = config(folder, "transformer")
    published = {"in_channels": 16, "patch_size": 2, "qk_norm": "rms_norm", "sample_size": 128}
    assert published.items() <= transformer.items()
    assert transformer["dual_attention_layers"]
    assert config(folder, "scheduler")["shift"] == 3.0
    published = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    assert published.items() <= config(folder, "vae").items()


def test_sd3_large_has_two_shards_and_single_attention(folders):
    folder = folders["sd35-large"]
    assert {SHARDED.format(n, 2) for n in (1, 2)} < files(folder / "transformer")
    assert config(folder, "transformer")["dual_attention_layers"] == []


def test_sana_is_laid_out_as_sana_1_5(folders):
    folder = folders["sana-1.5"]
    assert files(folder / "text_encoder") == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert files(folder / "tokenizer") == {
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    published = {"in_channels": 32, "patch_size": 1, "sample_size": 32, "guidance_embeds": False}
    assert published.items() <= config(folder, "transformer").items()
    assert config(folder, "transformer")["qk_norm"] == "rms_norm_across_heads"
    published = {"latent_channels": 32, "scaling_factor": 0.41407}
    assert published.items() <= config(folder, "vae").items()
    assert config(folders["sana-sprint"], "transformer")["guidance_embeds"] is True


def test_hidream_names_a_text_encoder_that_its_folder_does_not_hold(folders):
    folder = folders["hidream-full"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_4"] == ["transformers", "LlamaForCausalLM"]
    assert index["tokenizer_4"] == ["transformers", "PreTrainedTokenizerFast"]
    assert not {"text_encoder_4", "tokenizer_4"} & files(folder)
    assert {SHARDED.format(n, 7) for n in range(1, 8)} < files(folder / "transformer")
    assert {"model-00004-of-00004.safetensors", "model.safetensors.index.json"} < files(
        folders["llama-3.1-8b-instruct"]
    )


def test_weights_are_bfloat16_and_depend_on_the_seed_alone(folders, tmp_path):
    torch.manual_seed(1)
    again = tiny_pipelines.flux(tmp_path / "again")
    other = tiny_pipelines.flux(tmp_path / "other", seed=1)
    for file in (folders["flux-dev"]).rglob("*"):
        place = file.relative_to(folders["flux-dev"])
        if file.is_file():
            assert (again / place).read_bytes() == file.read_bytes(), place
        if file.suffix == ".safetensors":
            assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    name = "text_encoder/model.safetensors"
    assert (other / name).read_bytes() != (again / name).read_bytes()


def test_clips_tokenizer_is_clips(folders):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folders["flux-dev"] / "tokenizer")
    assert len(tokenizer) == 49408
    # "a photo of a cat", as CLIP's own tokenizer numbers it.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_t5s_tokenizer_knows_the_words_of_its_prompts(folders):
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(folders["flux-dev"] / "tokenizer_2")
    ids = tokenizer("a photo of a bench").input_ids
    assert ids[-1] == 1 and 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a photo of a bench"
    assert len(tokenizer) <= tiny_pipelines.T5_TOKENS
