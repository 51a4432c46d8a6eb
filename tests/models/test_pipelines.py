"""Models that are compared as published, on tiny random checkpoints in their layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline
from safetensors.torch import load_file, save_file
from support import tiny_pipelines

from tafs.common import seeding
from tafs.models import adapters, catalog, pipelines

SHIPPED = catalog.read_file(catalog.FILE)
MODELS = {name: model for name, model in SHIPPED.items() if model.assets == "hub"}
PROMPTS = ["a photo of a bench", "a photo of two clocks"]
STEPS = 4  # at most, because a tiny model's images do not improve with more
# HiDream's pipeline supports one resolution.
RESOLUTION = {"HiDreamImagePipeline": 1024}
SHARDED = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny folder for each resource."""
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


@pytest.mark.parametrize("name", MODELS)
def test_images_depend_on_prompt_and_generator_only(name, folders):
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


def test_a_pipeline_without_guidance_is_called_without_it(folders, tmp_path):
    """FLUX.2 [klein]'s with cached keys takes no guidance_scale; neither length is given."""
    folder = shutil.copytree(folders["flux2-klein-base-4b"], tmp_path / "klein")
    index = json.loads((folder / "model_index.json").read_text())
    kind = "Flux2KleinKVPipeline"
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    changes = {"pipeline": kind, "trainable": False, "steps": STEPS}
    changes |= {"guidance": None, "max_sequence_length": None}
    model = MODELS["flux2-klein-base-4b"].model_copy(update=changes)
    loaded = pipelines.ReferencePipeline.load(
        model, {model.resource: folder}, resolution=64, dtype=torch.float32
    )
    found = loaded.generate(PROMPTS, generators(0, 1))
    plain = Flux2KleinKVPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )(
        prompt=PROMPTS,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        generator=generators(0, 1),
        output_type="pt",
    ).images
    torch.testing.assert_close(found, plain)
    with pytest.raises(ValueError, match="guidance: a Flux2KleinKVPipeline takes no 'guidance_sca"):
        pipelines.ReferencePipeline.load(
            model.model_copy(update={"guidance": 4.0}), {model.resource: folder}, resolution=64
        )


def test_guidance_may_have_another_name(folders):
    changes = {"guidance_argument": "true_cfg_scale", "guidance": 3.0, "steps": STEPS}
    changes |= {"arguments": {"negative_prompt": "a blur", "guidance_scale": 2.0}}
    model = MODELS["flux-dev"].model_copy(update=changes)
    assert model.settings()["guidance_argument"] == "true_cfg_scale"
    assert not any("guidance_argument" in shipped.settings() for shipped in SHIPPED.values())
    loaded = pipelines.ReferencePipeline.load(model, folders, resolution=64, dtype=torch.float32)
    plain = loaded.pipeline(
        PROMPTS,
        negative_prompt="a blur",
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        true_cfg_scale=3.0,
        max_sequence_length=model.max_sequence_length,
        generator=generators(0, 1),
        output_type="pt",
    ).images
    torch.testing.assert_close(loaded.generate(PROMPTS, generators(0, 1)), plain)


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


def test_weights_are_loaded_in_the_requested_precision(folders):
    loaded = pipelines.ReferencePipeline.load(MODELS["hidream-fast"], folders, resolution=1024)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3", "text_encoder_4"):
        assert loaded.pipeline.components[name].dtype == torch.bfloat16


def test_prompts_of_the_fourth_text_encoder_are_padded_on_the_right(folders, tmp_path):
    llama = shutil.copytree(folders["llama-3.1-8b-instruct"], tmp_path / "llama")
    file = llama / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    found = []
    for place in (folders["llama-3.1-8b-instruct"], llama):
        loaded = load("hidream-fast", {**folders, "llama-3.1-8b-instruct": place}, 1024)
        tokenizer = loaded.pipeline.tokenizer_4
        found.append(tokenizer("a bench", padding="max_length", max_length=128).attention_mask)
    assert found[0] == found[1] == [1] * sum(found[0]) + [0] * (128 - sum(found[0]))
    assert 0 < sum(found[0]) < 128


def test_images_of_another_resolution_and_a_missing_generator_are_refused(folders):
    with pytest.raises(ValueError, match="HiDream-I1-Fast generates 1024 x 1024 pixels instead"):
        load("hidream-fast", folders, 512).generate(PROMPTS[:1], generators(0))
    with pytest.raises(ValueError, match="2 prompts and 1 generators"):
        load("flux-schnell", folders).generate(PROMPTS, generators(0))


def test_a_missing_resource_and_a_folder_of_another_pipeline_are_named(folders):
    only = {"hidream-full": folders["hidream-full"]}
    with pytest.raises(FileNotFoundError, match="llama-3.1-8b-instruct: HiDream-I1-Full needs"):
        load("hidream-full", only)
    other = {"flux-dev": folders["sd35-medium"]}
    with pytest.raises(ValueError, match="'StableDiffusion3Pipeline'.*'FluxPipeline'"):
        load("flux-dev", other)


@pytest.mark.parametrize(
    ("name", "resource", "message"),
    [
        ("flux-dev", "flux-dev", "model_index.json: not found"),
        ("hyper-flux", "hyper-flux", "Hyper-FLUX.*safetensors: adapter not found"),
        ("hidream-fast", "llama-3.1-8b-instruct", "config.json: not found"),
    ],
)
def test_an_empty_folder_is_named(folders, tmp_path, name, resource, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(name, {**folders, resource: tmp_path})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"intermediate_timesteps": None}}, "arguments: 'inter.*FluxPipeline"),
        ({"arguments": {"height": None}}, "arguments: 'height' cannot be set for a FluxPipeline"),
        ({"pipeline": "NoPipeline"}, "pipeline: diffusers has no 'NoPipeline'"),
        ({"pipeline": "DDPMPipeline"}, "a DDPMPipeline takes no 'prompt', which FLUX.1-dev needs"),
        (
            {"pipeline": "QwenImage21Pipeline"},
            "guidance: a QwenImage21Pipeline takes no 'guidance_scale' "
            r"\(similar: true_cfg_scale\); "
            "set `guidance` of FLUX.1-dev to null or `guidance_argument` to one of these names",
        ),
        (
            {"pipeline": "PRXPipeline"},
            "max_sequence_length: a PRXPipeline takes no 'max_sequence_length' "
            r"\(similar: tokenizer_max_length\); set `max_sequence_length` of FLUX.1-dev to null$",
        ),
        (
            {"guidance_argument": "true_cfg_scale", "arguments": {"true_cfg_scale": 2}},
            "arguments: 'true_cfg_scale' cannot be set",
        ),
    ],
)
def test_an_entry_that_does_not_fit_its_pipeline_is_named(folders, tmp_path, changes, message):
    model = MODELS["flux-dev"].model_copy(update=changes)
    index = json.loads((folders["flux-dev"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": model.pipeline}))
    with pytest.raises(ValueError, match=message):
        pipelines.ReferencePipeline.load(model, {"flux-dev": tmp_path}, resolution=64)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_model_index_has_as_many_bytes_as_the_published_one(folders):
    published = {
        **{"flux-dev": 536, "sd35-medium": 706, "hidream-fast": 836},
        **{"sana-1.5": 401, "sana-sprint": 392},
    }
    for name, size in published.items():
        assert (folders[name] / "model_index.json").stat().st_size == size, name


def test_weight_files_are_named_as_in_the_published_repositories(folders):
    for name, shards in (("flux-dev", 3), ("sd35-large", 2), ("hidream-full", 7)):
        expected = {SHARDED.format(n, shards) for n in range(1, shards + 1)}
        index = "diffusion_pytorch_model.safetensors.index.json"
        assert files(folders[name] / "transformer") == {"config.json", index, *expected}
    sd3 = folders["sd35-medium"]
    assert files(sd3 / "transformer") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files(sd3 / "text_encoder_3") == {
        "config.json",
        *(f"model{v}-0000{n}-of-00002.safetensors" for n in (1, 2) for v in ("", ".fp16")),
        *(f"model.safetensors.index{variant}.json" for variant in ("", ".fp16")),
    }
    llama = files(folders["llama-3.1-8b-instruct"])
    assert {"model-00004-of-00004.safetensors", "model.safetensors.index.json"} < llama
    index = json.loads((folders["hidream-full"] / "model_index.json").read_text())
    assert index["text_encoder_4"] == ["transformers", "LlamaForCausalLM"]
    assert not {"text_encoder_4", "tokenizer_4"} & files(folders["hidream-full"])


def test_weights_are_bfloat16_and_depend_on_the_seed_only(folders, tmp_path):
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
    # The numbers of CLIP's published tokenizer.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("name", ["flux-schnell", "sana-1-5"])
def test_an_adapter_of_another_program_adds_its_layers(name, folders, tmp_path):
    loaded = load(name, folders)
    layer = "transformer_blocks.0.attn1.to_q"
    layer = layer if name == "sana-1-5" else "transformer_blocks.0.attn.to_q"
    linear = loaded.pipeline.transformer.get_submodule(layer)
    state = {
        f"{layer}.lora_A.weight": torch.randn(2, linear.in_features),
        f"{layer}.lora_B.weight": torch.randn(linear.out_features, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "mine.safetensors")
    read = adapters.read(tmp_path / "mine.safetensors")
    adapters.write(adapters.convert(read, loaded.pipeline), tmp_path / "converted.safetensors")
    x = torch.randn(1, linear.in_features)
    up, down = state[f"{layer}.lora_B.weight"], state[f"{layer}.lora_A.weight"]
    expected = linear(x) + x @ down.T @ up.T / 2
    loaded.load_adapter(tmp_path / "converted.safetensors")
    torch.testing.assert_close(loaded.pipeline.transformer.get_submodule(layer)(x), expected)
