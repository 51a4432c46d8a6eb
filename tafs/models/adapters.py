"""LoRA adapters of any program, read as layers and written in the one layout that is loaded.

| layout | names of a layer's matrices | alpha |
|---|---|---|
| diffusers' pipelines | `transformer.NAME.lora_A.weight`, `text_encoder...` | header, or none |
| diffusers' networks | `NAME.lora_A.weight` | header, or none |
| PEFT | `base_model.model.NAME.lora_A.weight` | adapter_config.json |
| kohya's scripts | `lora_unet_...lora_down.weight` | tensors `....alpha` |

The names of kohya's scripts are those of diffusers, or those of the original FLUX.1 (which
diffusers converts) and Stable Diffusion 3.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tafs.common import files
from tafs.common.errors import shown
from tafs.common.yaml_files import first_problem

CONFIG = "adapter_config.json"  # of PEFT
PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"  # diffusers' entry of a file's header
TRANSFORMER = "transformer"
ENDINGS = {
    **dict.fromkeys((".lora_A", ".lora_A.default", ".lora_down", ".lora.down"), "A"),
    **dict.fromkeys((".lora_B", ".lora_B.default", ".lora_up", ".lora.up"), "B"),
    ".lora_linear_layer.down": "A",
    ".lora_linear_layer.up": "B",
}
# The components that kohya's prefixes mean, and the networks' prefixes of other programs.
KOHYA = {
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
NETWORK = ("base_model.model.", "diffusion_model.", "model.diffusion_model.")
# The layers of a block of the original Stable Diffusion 3, whose queries, keys and values are one
# matrix, as in diffusers' convert_sd3_transformer_checkpoint_to_diffusers.
SD3_BLOCK = re.compile(r"joint_blocks[._](\d+)[._](x|context)_block[._](.+)")
SD3_LAYERS = {
    "x.attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x.attn_proj": ("attn.to_out.0",),
    "x.attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x.attn2_proj": ("attn2.to_out.0",),
    "x.mlp_fc1": ("ff.net.0.proj",),
    "x.mlp_fc2": ("ff.net.2",),
    "context.attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context.attn_proj": ("attn.to_add_out",),
    "context.mlp_fc1": ("ff_context.net.0.proj",),
    "context.mlp_fc2": ("ff_context.net.2",),
}


class _Settings(BaseModel):
    """What of PEFT's LoraConfig decides an adapter's strength, or cannot be judged."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: float
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    # The others change the base model's weights too.
    init_lora_weights: bool | None | Literal["gaussian", "eva", "orthogonal"] = True
    use_dora: Literal[False, None] = False
    layer_replication: None = None
    alora_invocation_tokens: None = None

    def scale(self, name: str, rank: int) -> float:
        """The factor of B A in a layer, as in PEFT."""
        from peft.utils.other import get_pattern_key

        key = get_pattern_key(list(self.alpha_pattern), name)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's files."""

    path: Path  # as given
    file: Path  # of the weights
    sha256: str  # of the weights and the configuration
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, _Settings]  # by component: transformer, text_encoder, ...

    @property
    def alpha(self) -> str:
        """Where the strength is stated, in words."""
        if self.settings:
            return "of the file's configuration"
        ranks = sum(_part(key)[1] == "A" for key in self.tensors)
        alphas = sum(_part(key)[1] == "alpha" for key in self.tensors)
        if alphas:
            missing = f"; {ranks - alphas} of {ranks} layers have none, and take their rank"
            return "of the file's tensors" + (missing if alphas < ranks else "")
        return "none in the file; every layer takes its rank, so that B A is added as it is"


def read(path: Path) -> Adapter:
    """Read an adapter's files.

    Args:
        path: a .safetensors file, or a folder with one, or a folder of PEFT.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file with a LoRA adapter; one line that names it.
    """
    file = _locate(path)
    files.check_readable(file)
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: is not a safetensors file ({error}); download or save it again"
        ) from None
    digest = hashlib.sha256(files.sha256(file).encode())
    settings: dict[str, _Settings] = {}
    config = file.with_name(CONFIG)
    if file.name == PEFT_FILE and config.is_file():
        digest.update(files.sha256(config).encode())
        settings[TRANSFORMER] = _settings(_json(config.read_text(encoding="utf-8"), config), config)
    elif HEADER in header:
        settings = _of_header(_json(header[HEADER], file), file)
    return Adapter(path, file, digest.hexdigest(), tensors, settings)


def _locate(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; give an adapter's .safetensors file or folder")
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        preferred = PEFT_FILE if (path / CONFIG).is_file() else DIFFUSERS_FILE
        chosen = [file for file in found if file.name == preferred] or found
        if not chosen:
            raise ValueError(
                f"{path}: holds no .safetensors file; pickles (.bin, .pt, .ckpt) are not read, "
                "because they can run code: save the adapter as .safetensors"
            )
        if len(chosen) > 1:
            names = ", ".join(file.name for file in chosen[:4])
            raise ValueError(f"{path}: holds several files ({names}); give one of them")
        return chosen[0]
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: is not a .safetensors file; pickles (.bin, .pt, .ckpt) are not read, because "
            "they can run code: save the adapter as .safetensors"
        )
    return path


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: its configuration is not a JSON object; save the adapter again")
    return content


def _of_header(content: Mapping[str, Any], file: Path) -> dict[str, _Settings]:
    """The settings of each component; keys without a component are the transformer's."""
    components: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, dot, name = key.partition(".")
        place = (component, name) if dot else (TRANSFORMER, key)
        components.setdefault(place[0], {})[place[1]] = value
    return {component: _settings(found, file) for component, found in components.items()}


def _settings(content: Mapping[str, Any], file: Path) -> _Settings:
    try:
        return _Settings.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, _Settings)
        raise ValueError(f"{file}: this kind of adapter cannot be judged: {problem}") from None


def _part(key: str) -> tuple[str, str]:
    """(layer, "A", "B" or "alpha") of a tensor's name; the second is "" for other tensors."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    stem = key.removesuffix(".weight")
    ending = max((e for e in ENDINGS if stem.endswith(e)), key=len, default="")
    known = ending and stem != key
    return (stem.removesuffix(ending), ENDINGS[ending]) if known else (key, "")


class _Modules:
    """The linear layers of a pipeline's components that adapters can change."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.layers: dict[str, dict[str, nn.Linear]] = {}
        for component in getattr(pipeline, "_lora_loadable_modules", ()):
            module = getattr(pipeline, component, None)
            if isinstance(module, nn.Module):
                named = module.named_modules()
                found = {name: m for name, m in named if isinstance(m, nn.Linear)}
                self.layers[component] = found
        self.flat = {
            component: {name.replace(".", "_"): name for name in found}
            for component, found in self.layers.items()
        }

    def place(self, stem: str) -> list[tuple[str, str]]:
        """The layers (component, name) that a file's layer adapts; [] for an unknown one."""
        component, _, name = stem.partition(".")
        if component in self.layers:
            return self._known(component, name)
        for prefix, component in KOHYA.items():
            if component in self.flat and stem.startswith(prefix):
                flat = stem.removeprefix(prefix)
                options = (flat, flat.removeprefix("text_model_"))
                known = self.flat[component]
                names = [known[option] for option in options if option in known]
                return [(component, names[0])] if names else self._original(stem)
        for prefix in ("", *NETWORK):
            if stem.startswith(prefix) and (
                found := self._known(TRANSFORMER, stem.removeprefix(prefix))
            ):
                return found
        return self._original(stem)

    def _known(self, component: str, name: str) -> list[tuple[str, str]]:
        options = (name, name.removeprefix("text_model."))
        known = self.layers.get(component, {})
        return [(component, one) for one in options if one in known][:1]

    def _original(self, stem: str) -> list[tuple[str, str]]:
        """The layers that one of the original Stable Diffusion 3 consists of."""
        match = SD3_BLOCK.search(stem)
        if not match:
            return []
        parts = SD3_LAYERS.get(f"{match[2]}.{match[3].replace('.', '_')}", ())
        names = [f"transformer_blocks.{match[1]}.{part}" for part in parts]
        known = self.layers.get(TRANSFORMER, {})
        return [(TRANSFORMER, name) for name in names] if all(n in known for n in names) else []


def convert(adapter: Adapter, pipeline: Any) -> dict[str, Tensor]:
    """The adapter in the names of diffusers' pipelines, float32, B multiplied by its factor.

    Every layer of the pipeline's model becomes W + B A, as in the files that training writes.

    Raises:
        ValueError: a tensor does not belong to a layer of the model, or is not finite; one line
            that names it.
    """
    file, modules = adapter.file, _Modules(pipeline)
    layers = _layers(adapter.tensors)
    unknown = [stem for stem, parts in layers.items() if "" in parts or not modules.place(stem)]
    if unknown:
        renamed = _converted_by_diffusers(adapter, pipeline, unknown)
        layers = {stem: parts for stem, parts in layers.items() if stem not in unknown}
        layers |= _layers(renamed)
    state: dict[str, Tensor] = {}
    for stem, parts in layers.items():
        places = modules.place(stem)
        where = f"{file}: the layer {shown(stem)}"
        if "" in parts or not places:
            raise _foreign(file, stem, pipeline)
        if not parts.keys() >= {"A", "B"}:
            raise ValueError(f"{where} lacks one of its two matrices; save the adapter again")
        down, up = parts["A"].float(), parts["B"].float()
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"{where} holds NaN or infinity; save the adapter again")
        for (component, name), rows in zip(places, up.chunk(len(places)), strict=True):
            layer = modules.layers[component][name]
            expected = ((len(down), layer.in_features), (layer.out_features, len(down)))
            if (tuple(down.shape), tuple(rows.shape)) != expected:
                raise ValueError(
                    f"{where} has the shapes {list(down.shape)} and {list(up.shape)}, which do "
                    f"not fit {component}.{name} of {list(layer.weight.shape)}; choose the model "
                    "that it was trained on"
                )
            if (key := f"{component}.{name}") + ".lora_A.weight" in state:
                raise ValueError(f"{where} adapts {key} a second time; save the adapter again")
            scale = _scale(adapter, parts, component, name, len(down), where)
            state[f"{key}.lora_A.weight"] = down.clone()
            state[f"{key}.lora_B.weight"] = (rows * scale).contiguous()
    if not state:
        raise ValueError(f"{file}: holds no tensors; give a LoRA adapter")
    return state


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and part."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part = _part(key)
        found.setdefault(stem, {})[part] = tensor
    return found


def _scale(
    adapter: Adapter, parts: Mapping[str, Tensor], component: str, name: str, rank: int, where: str
) -> float:
    settings = adapter.settings.get(component)
    if settings is None:
        return float(parts["alpha"]) / rank if "alpha" in parts else 1.0
    if "alpha" in parts:
        raise ValueError(f"{where} has an alpha besides the file's configuration; remove one")
    return settings.scale(name, rank)


def _converted_by_diffusers(
    adapter: Adapter, pipeline: Any, unknown: list[str]
) -> Mapping[str, Tensor]:
    """The tensors of unknown layers, as the pipeline's own loader names them.

    It multiplies by alpha itself, and would leave out text encoders' layers and differences of
    norms that it does not know.
    """
    own = {k: tensor for k, tensor in adapter.tensors.items() if _part(k)[0] in unknown}
    odd = [k for k in own if not _part(k)[1] and "processor" not in k]
    odd += [k for k in own if k.startswith(("lora_te", "text_encoder"))]
    if odd or adapter.settings or not hasattr(pipeline, "lora_state_dict"):
        raise _foreign(adapter.file, (odd or unknown)[0], pipeline)
    try:
        found = type(pipeline).lora_state_dict({k: tensor.float() for k, tensor in own.items()})
    except (ValueError, KeyError, AssertionError, RuntimeError, IndexError):
        raise _foreign(adapter.file, unknown[0], pipeline) from None
    return {k: tensor for k, tensor in found.items() if isinstance(tensor, Tensor)}


def _foreign(file: Path, stem: str, pipeline: Any) -> ValueError:
    return ValueError(
        f"{file}: {shown(stem)} is not part of a LoRA adapter of this {type(pipeline).__name__}; "
        "choose the model that it was trained on (DoRA, LoKr and whole layers are not read)"
    )


def write(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a converted adapter atomically; several processes may write the same one."""
    with files.atomic(file, shared=True) as temporary:
        save_file(dict(state), temporary)


def components(file: Path) -> list[str]:
    """The components that a file with the names of diffusers adapts.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
        ValueError: the file is not a safetensors file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: adapter not found; train the run first")
    files.check_readable(file)
    try:
        with safe_open(file, framework="numpy") as content:
            return sorted({key.partition(".")[0] for key in content.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file}: is not a safetensors file ({error}); train the run again"
        ) from None


def attach(pipeline: Any, file: Path) -> list[str]:
    """Load a file with the names of diffusers into a pipeline; return the components it adapts.

    Raises:
        FileNotFoundError, OSError, ValueError: as for `components`.
    """
    found = components(file)
    # Without `use_safetensors`, diffusers could read the file as a pickle.
    pipeline.load_lora_weights(
        file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True
    )
    return found


@torch.no_grad()
def restore_precision(pipeline: Any, file: Path, components: list[str]) -> None:
    """Compute attached adapters as in training; diffusers loads them in the network's precision."""
    from tafs.models import lora

    saved = load_file(file)
    for component in components:
        lora.install(getattr(pipeline, component))
        for name, parameter in getattr(pipeline, component).named_parameters():
            if "lora_" in name:
                # peft puts the adapter's name, which files lack, before `weight`.
                key = re.sub(r"\.[^.]+\.weight$", ".weight", name)
                parameter.data = saved[f"{component}.{key}"].float().to(parameter.device)
