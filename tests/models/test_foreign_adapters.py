"""Adapters of other programs get the strength that these programs give them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.checkpoints import EMBEDDED, PROMPTS, embedded
from torch import Tensor

from tafs.common import seeding
from tafs.models import adapters

TARGETS = ["attn.to_q", "attn.add_k_proj", "ff.net.2", "proj_out"]
# Neither rank nor alpha is the same for all layers, and no factor is 1.
CONFIG = {
    "r": 4,
    "lora_alpha": 2,
    "target_modules": TARGETS,
    "rank_pattern": {r"transformer_blocks.0.attn.to_q": 8},
    "alpha_pattern": {"ff.net.2": 12},
}
Deltas = dict[str, Tensor]


@pytest.fixture(params=EMBEDDED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(name: str) -> DiffusionPipeline:
    return embedded(name).pipeline()


def randomised(module: Any) -> Any:
    """With random numbers in all matrices of its adapter."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                drawn = torch.randn(parameter.shape, generator=seeding.generator(3, key))
                parameter.copy_(0.2 * drawn)
    return module


def by_peft(module: Any, adapter: str = "default") -> Deltas:
    """What PEFT adds to each layer's weights."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def added(state: Mapping[str, Tensor], component: str = "transformer") -> Deltas:
    """What a converted adapter adds to each layer's weights."""
    return {
        key[len(component) + 1 : -len(".lora_A.weight")]: state[key.replace("_A", "_B")] @ tensor
        for key, tensor in state.items()
        if key.startswith(f"{component}.") and key.endswith("lora_A.weight")
    }


def converted(path: Path, pipeline: Any) -> dict[str, Tensor]:
    return adapters.convert(adapters.read(path), pipeline)


def same(found: Deltas, expected: Deltas) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)


def dreambooth(pipeline: Any, folder: Path, **more: Any) -> Path:
    """As diffusers' train_dreambooth_lora_flux.py and ..._sd3.py save."""
    metadata = _collate_lora_metadata({"transformer": pipeline.transformer}) if more else {}
    layers = get_peft_model_state_dict(pipeline.transformer)
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    return folder


def flat(folder: Path, pipeline: Any, prefix: str, dot: str, names: tuple[str, str]) -> Path:
    """Layers of several ranks with tensors of alpha, under other names."""
    state = {}
    for key, tensor in get_peft_model_state_dict(pipeline.transformer).items():
        layer, kind, _ = key.rsplit(".", 2)
        stem = prefix + layer.replace(".", dot)
        state[f"{stem}.{names['AB'.index(kind[-1])]}.weight"] = tensor.contiguous()
        state[f"{stem}.alpha"] = torch.tensor(12.0 if layer.endswith("ff.net.2") else 2.0)
    save_file(state, folder / "other.safetensors")
    return folder / "other.safetensors"


PEFT, KOHYA = ("lora_A", "lora_B"), ("lora_down", "lora_up")
LAYOUTS: dict[str, Callable[[Path, Any], Path]] = {
    "diffusers' pipeline, header": lambda f, p: dreambooth(p, f, header=True),
    "diffusers' pipeline, alpha": lambda f, p: flat(f, p, "transformer.", ".", PEFT),
    "old diffusers, alpha": lambda f, p: flat(f, p, "transformer.", ".", ("lora.down", "lora.up")),
    "diffusers' network": lambda f, p: p.transformer.save_lora_adapter(f) or f,
    "bare names, alpha": lambda f, p: flat(f, p, "", ".", PEFT),
    "ComfyUI": lambda f, p: flat(f, p, "diffusion_model.", ".", KOHYA),
    "kohya": lambda f, p: flat(f, p, "lora_unet_", "_", KOHYA),
    "kohya, transformer": lambda f, p: flat(f, p, "lora_transformer_", "_", KOHYA),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_strength_of_its_alpha(layout, name, pipeline, tmp_path):
    pipeline.transformer.add_adapter(LoraConfig(**CONFIG))
    expected = by_peft(randomised(pipeline.transformer))
    path = LAYOUTS[layout](tmp_path, pipeline)
    found = added(converted(path, embedded(name).pipeline()))
    assert len({delta.shape for delta in expected.values()}) > 1
    assert same(found, expected)
    assert not same({k: v / 2 for k, v in found.items()}, expected)
    assert "none" not in adapters.read(path).alpha


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_has_the_strength_of_its_configuration(rslora, name, pipeline, tmp_path):
    model = get_peft_model(pipeline.transformer, LoraConfig(**CONFIG, use_rslora=rslora))
    randomised(model).save_pretrained(tmp_path)
    plain = embedded(name).pipeline()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert same(added(converted(path, plain)), by_peft(model))


def test_a_file_without_alpha_adds_b_a_and_says_so(name, pipeline, tmp_path):
    config = {key: CONFIG[key] for key in ("r", "lora_alpha", "target_modules")}
    pipeline.transformer.add_adapter(LoraConfig(**config))
    expected = by_peft(randomised(pipeline.transformer))
    path = dreambooth(pipeline, tmp_path)
    assert "none in the file" in adapters.read(path).alpha
    found = added(converted(path, embedded(name).pipeline()))
    assert same(found, {key: 2 * delta for key, delta in expected.items()})  # alpha is half of r
    file = path / adapters.DIFFUSERS_FILE
    alpha = {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(2.0)}
    save_file(load_file(file) | alpha, file)
    layers = len(expected)
    assert f"{layers - 1} of {layers} layers have none" in adapters.read(path).alpha


def fused(width: int, stem: str, rank: int = 6) -> dict[str, Tensor]:
    """kohya's file of one layer with queries, keys and values in one matrix; alpha is 3."""
    draw = seeding.generator(4, stem)
    return {
        f"{stem}.lora_down.weight": torch.randn(rank, width, generator=draw),
        f"{stem}.lora_up.weight": torch.randn(3 * width, rank, generator=draw),
        f"{stem}.alpha": torch.tensor(3.0),
    }


def delta_of(state: Mapping[str, Tensor], stem: str) -> Tensor:
    return 0.5 * state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]


def test_kohyas_layers_of_the_original_flux_become_those_of_diffusers(tmp_path):
    plain = embedded("shapes-flux").pipeline()
    width = plain.transformer.inner_dim
    stem = "lora_unet_double_blocks_0_txt_attn_qkv"
    save_file(state := fused(width, stem), tmp_path / "x.safetensors")
    names = [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
    expected = dict(zip(names, delta_of(state, stem).chunk(3), strict=True))
    assert same(added(converted(tmp_path / "x.safetensors", plain)), expected)


class Original(dict):
    """A checkpoint of the original SD3: other layers than those given hold zeros."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6, 1)

    def pop(self, key: str) -> Tensor:
        return super().pop(key) if key in self else self[key]


def test_kohyas_layers_of_the_original_sd3_become_those_of_diffusers(tmp_path):
    plain = embedded("shapes-sd3").pipeline()
    width = plain.transformer.inner_dim
    layers, state, names = len(plain.transformer.transformer_blocks), {}, {}
    for i in range(layers):
        for part in ("x_block.attn.qkv", "context_block.attn.qkv"):
            name = f"joint_blocks.{i}.{part}"
            names[name] = f"lora_unet_{name.replace('.', '_')}"
            state |= fused(width, names[name])
        for part, rows, columns in (("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
            block = "x_block.attn" if part == "proj" else "x_block.mlp"
            name = f"joint_blocks.{i}.{block}.{part}"
            names[name] = stem = f"lora_unet_{name.replace('.', '_')}"
            state[f"{stem}.lora_down.weight"] = torch.randn(6, columns * width)
            state[f"{stem}.lora_up.weight"] = torch.randn(rows * width, 6)
            state[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(state, tmp_path / "x.safetensors")
    deltas = Original({f"{key}.weight": delta_of(state, stem) for key, stem in names.items()})
    deltas["context_embedder.weight"] = torch.zeros(width, 1)
    known = convert_sd3_transformer_checkpoint_to_diffusers(deltas)
    expected = {k.removesuffix(".weight"): v for k, v in known.items() if v.numel() and v.any()}
    assert len(expected) == layers * 9
    assert same(added(converted(tmp_path / "x.safetensors", plain)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoders_adapter_changes_prompts_that_were_encoded_before(dtype, tmp_path):
    checkpoint = embedded("shapes-flux")
    trained, plain = checkpoint.pipeline(), checkpoint.load(dtype=dtype)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "fc1"])
    trained.text_encoder.add_adapter(config)
    trained.transformer.add_adapter(LoraConfig(**CONFIG))
    for module in (randomised(trained.transformer), randomised(trained.text_encoder)):
        assert by_peft(module)
    parts = {"transformer": trained.transformer, "text_encoder": trained.text_encoder}
    type(trained).save_lora_weights(
        tmp_path,
        **{f"{k}_lora_layers": get_peft_model_state_dict(v) for k, v in parts.items()},
        **_collate_lora_metadata(parts),
    )
    before = plain.encode(PROMPTS).pooled
    state = converted(tmp_path, plain.pipeline)
    assert same(added(state, "text_encoder"), by_peft(trained.text_encoder))
    adapters.write(state, tmp_path / "converted.safetensors")
    plain.load_adapter(tmp_path / "converted.safetensors")
    after, expected = plain.encode(PROMPTS).pooled, trained.encode_prompt(PROMPTS, None)[1]
    change, error = ((x.float() - expected).norm() for x in (before, after))
    assert error < (1e-4 if dtype == torch.float32 else 0.2) * change
    if dtype == torch.bfloat16:
        held = dict(plain.pipeline.text_encoder.named_parameters())
        key = next(key for key in held if key.endswith("q_proj.lora_B.default_0.weight"))
        saved = state["text_encoder." + key.replace(".default_0", "")]
        assert torch.equal(held[key], saved)


STEM = "transformer.transformer_blocks.0.attn.to_q"


def layer(rank: int = 4, stem: str = STEM, **changes: Any) -> dict[str, Tensor]:
    width = embedded("shapes-sd3").pipeline().transformer.inner_dim
    found = {f"{stem}.lora_A.weight": torch.ones(rank, width)}
    found |= {f"{stem}.lora_B.weight": torch.ones(width, rank)}
    return found | changes


def alphas(config: Mapping[str, Any]) -> dict[str, str]:
    return {adapters.HEADER: json.dumps({f"transformer.{k}": v for k, v in config.items()})}


@pytest.mark.parametrize(
    "tensors, header, said",
    [
        (lambda: layer(stem="transformer.transformer_blocks.99.attn.to_q"), {}, "choose the model"),
        (lambda: {STEM + ".weight": torch.ones(2)}, {}, "whole layers are not read"),
        (lambda: layer() | {STEM + ".dora_scale": torch.ones(1)}, {}, "DoRA, LoKr"),
        (lambda: {STEM + ".lora_A.weight": torch.ones(4, 1)}, {}, "lacks one of its two matrices"),
        (lambda: layer() | {STEM + ".lora_A.weight": torch.ones(4, 3)}, {}, "do not fit"),
        (lambda: layer() | {STEM + ".lora_A.weight": torch.ones(4, 3) / 0}, {}, "NaN or infinity"),
        (lambda: layer() | layer(stem=STEM.removeprefix("transformer.")), {}, "a second time"),
        (lambda: {}, {}, "holds no tensors"),
        (layer, {adapters.HEADER: "{"}, "is not a JSON object"),
        (layer, alphas({"r": 4}), "missing key 'lora_alpha'"),
        (layer, alphas({"lora_alpha": 4, "use_dora": True}), "cannot be judged: use_dora"),
        (layer, alphas({"lora_alpha": 4, "init_lora_weights": "pissa"}), "init_lora_weights"),
        (
            lambda: layer() | {STEM + ".alpha": torch.tensor(4.0)},
            alphas({"lora_alpha": 4}),
            "has an alpha besides the file's configuration",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(tensors, header, said, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file, {"format": "pt", **header})
    with pytest.raises(ValueError) as refused:
        converted(file, embedded("shapes-sd3").pipeline())
    assert said in str(refused.value) and str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "files, given, said",
    [
        (["a.bin"], "a.bin", "pickles (.bin, .pt, .ckpt) are not read"),
        (["adapter_model.bin", "adapter_config.json"], "", "holds no .safetensors file; pickles"),
        (["a.safetensors", "b.safetensors"], "", "holds several files (a.safetensors, b.safe"),
        (["a.safetensors"], "a.safetensors", "is not a safetensors file"),
        ([], "c.safetensors", "not found; give an adapter's .safetensors file or folder"),
    ],
)
def test_a_path_without_one_safe_file_is_refused(files, given, said, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        adapters.read(tmp_path / given)
    assert said in str(refused.value) and "\n" not in str(refused.value)
