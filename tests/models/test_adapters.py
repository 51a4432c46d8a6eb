"""A saved adapter has the strength of training in every program that loads it."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import EMBEDDED, embedded, our_images, their_images
from torch import Tensor, nn

from tafs.models import Backbone

RANK = 4
PREFIX = "transformer."
adapted = cache(lambda name, alpha=8: embedded(name).adapted(alpha))
images = cache(lambda name: our_images(adapted(name)))


@pytest.fixture(params=EMBEDDED)
def name(request) -> str:
    return request.param


@pytest.fixture
def file(name, tmp_path) -> Path:
    path = tmp_path / "adapter.safetensors"
    adapted(name).save_adapter(path)
    return path


def header(file: Path) -> dict[str, Any]:
    """The adapter's configuration in a file."""
    with safe_open(file, "pt") as stored:
        found = json.loads(stored.metadata()["lora_adapter_metadata"])
    return {key.removeprefix(PREFIX): value for key, value in found.items()}


def unprefixed(file: Path) -> dict[str, Tensor]:
    return {key.removeprefix(PREFIX): tensor for key, tensor in load_file(file).items()}


def injected_by_peft(pipeline: DiffusionPipeline, file: Path) -> None:
    inject_adapter_in_model(LoraConfig(**header(file)), pipeline.transformer)
    set_peft_model_state_dict(pipeline.transformer, unprefixed(file))


def wrapped_by_peft(pipeline: DiffusionPipeline, file: Path) -> None:
    model = get_peft_model(pipeline.transformer, LoraConfig(**header(file)))
    state = {f"base_model.model.{key}": tensor for key, tensor in unprefixed(file).items()}
    missing = set_peft_model_state_dict(model, state)
    assert missing.unexpected_keys == []


def merged_by_hand(pipeline: DiffusionPipeline, file: Path) -> None:
    state = unprefixed(file)
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        layer = pipeline.transformer.get_submodule(key.removesuffix(".lora_A.weight"))
        layer.weight.data += state[key.replace("lora_A", "lora_B")] @ state[key]


def merged_by_convention(
    pipeline: DiffusionPipeline,
    file: Path,
    prefix: str,
    names: tuple[str, str] = ("lora_A", "lora_B"),
    dot: str = ".",
    alphas: bool = False,
) -> None:
    """Rename the file's tensors, add the header's alpha, and merge them as the program does."""
    state = {}
    for key, tensor in unprefixed(file).items():
        layer, kind, end = key.rsplit(".", 2)
        layer = prefix + layer.replace(".", dot)
        state[f"{layer}.{names['AB'.index(kind[-1])]}.{end}"] = tensor
        if alphas:
            state[f"{layer}.alpha"] = torch.tensor(float(header(file)["lora_alpha"]))
    layers = {
        prefix + path.replace(".", dot): layer
        for path, layer in pipeline.transformer.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert merge(layers, state) == len(load_file(file)) // 2


def merge(layers: Mapping[str, nn.Linear], state: Mapping[str, Tensor]) -> int:
    """Merge as ComfyUI and kohya's scripts do: W + alpha / rank B A; without alpha, W + B A."""
    merged = 0
    for path, layer in layers.items():
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if f"{path}.{down}.weight" in state:
                a, b = (state[f"{path}.{part}.weight"] for part in (down, up))
                alpha = state.get(f"{path}.alpha", torch.tensor(float(len(a))))
                layer.weight.data += alpha.item() / len(a) * (b @ a)
                merged += 1
    return merged


KOHYA = {"prefix": "lora_unet_", "names": ("lora_down", "lora_up"), "dot": "_"}
WAYS: dict[str, Callable[[Any, Path], None]] = {
    "pipeline, file": lambda p, file: p.load_lora_weights(file),
    "pipeline, folder": lambda p, f: p.load_lora_weights(f.parent, weight_name=f.name),
    "pipeline, only file of a folder": lambda p, file: p.load_lora_weights(file.parent),
    "pipeline, state dict": lambda p, file: p.load_lora_weights(load_file(file)),
    "network, file": lambda p, file: p.transformer.load_lora_adapter(file),
    "network, file with header": lambda p, file: p.transformer.load_lora_adapter(
        file.parent, weight_name=file.name
    ),
    "network, state dict": lambda p, file: p.transformer.load_lora_adapter(load_file(file)),
    "network, state dict without prefix": lambda p, file: p.transformer.load_lora_adapter(
        unprefixed(file), prefix=None
    ),
    "PEFT, PeftModel": wrapped_by_peft,
    "PEFT, injected": injected_by_peft,
    "W + B A": merged_by_hand,
    "ComfyUI, diffusers' names": partial(merged_by_convention, prefix="transformer."),
    "ComfyUI": partial(merged_by_convention, prefix="diffusion_model."),
    "ComfyUI, alpha": partial(merged_by_convention, prefix="diffusion_model.", alphas=True),
    "ComfyUI, up and down": partial(
        merged_by_convention, prefix="diffusion_model.", names=("lora_down", "lora_up"), alphas=True
    ),
    "kohya": partial(merged_by_convention, **KOHYA),
    "kohya, alpha": partial(merged_by_convention, **KOHYA, alphas=True),
}


def agrees(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_gives_the_trained_models_images(name, file, way):
    checkpoint = embedded(name)
    backbone, pipelines = checkpoint.load(), [checkpoint.pipeline() for _ in range(2)]
    WAYS[way](pipelines[0], file)
    assert agrees(their_images(backbone, pipelines[0]), images(name))
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    halved = {k: v / 2 if "lora_B" in k else v for k, v in load_file(file).items()}
    save_file(halved, file, metadata)
    WAYS[way](pipelines[1], file)
    assert not agrees(their_images(backbone, pipelines[1]), images(name))


def effective(backbone: Backbone, base: Backbone) -> dict[str, Tensor]:
    """The weights of the adapted layers, with the adapter."""
    plain = base.transformer.state_dict()
    return {
        name: plain[f"{name}.weight"] + layer.get_delta_weight("default").detach()
        for name, layer in backbone.transformer.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("alpha", [1, 4, 6, 8, 32])
def test_a_saved_adapter_has_the_trained_weights_exactly_if_the_ratio_is_a_power_of_two(
    name, alpha, tmp_path
):
    trained, loaded = adapted(name, alpha), embedded(name).load()
    file = tmp_path / "adapter.safetensors"
    before = {key: p.detach().clone() for key, p in trained.lora_parameters().items()}
    trained.save_adapter(file)
    assert all(torch.equal(p, before[key]) for key, p in trained.lora_parameters().items())
    expected = effective(trained, loaded)
    loaded.load_adapter(file)
    exact = math.log2(alpha / RANK).is_integer()
    assert expected
    for layer, weight in expected.items():
        found = loaded.transformer.state_dict()[f"{layer}.weight"]
        assert torch.equal(found, weight) or not exact
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=1e-6)


def test_the_header_describes_the_adapter(name, file):
    config = LoraConfig(**header(file))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, RANK, name)
    assert config.target_modules == set(adapted(name).lora_targets)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_the_header_names_the_repository_of_a_snapshot_of_the_hub(tmp_path):
    checkpoint = embedded("shapes-flux")
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoint.folder)
    backbone = checkpoint.backbone.load(snapshot, **checkpoint.settings)
    assert backbone.base_model == "black-forest-labs/FLUX.1-dev"


def test_an_embedded_model_is_a_pipeline_of_one_precision_in_plain_diffusers(name):
    checkpoint = embedded(name)
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.folder)
    modules = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    backbone = checkpoint.load()
    assert agrees(their_images(backbone, pipeline), our_images(backbone))
