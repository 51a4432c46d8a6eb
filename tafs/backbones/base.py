"""What every backbone shares: decoding, the time grid, LoRA, saving and loading adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from tafs.sampling import shifted

TIMESTEPS = 1000  # the networks read t in [0, 1] as a timestep in [0, 1000]

# The adapted layers: every projection of the joint attention, as in Flow-GRPO's public settings.
ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about each prompt; every tensor's first dimension is the batch.

    With classifier-free guidance the batch is the prompts', and the empty prompt's own
    conditioning stands in `negative`.
    """

    embeds: Tensor  # [B, L, D] token embeddings
    pooled: Tensor  # [B, P]
    negative: Conditioning | None = None

    def __getitem__(self, index: Any) -> Conditioning:
        negative = None if self.negative is None else self.negative[index]
        return Conditioning(self.embeds[index], self.pooled[index], negative)

    def repeat_interleave(self, times: int) -> Conditioning:
        """Each prompt `times` in a row, as a group's images are laid out."""
        return self[torch.arange(len(self.embeds)).repeat_interleave(times)]


class Backbone:
    """A diffusers pipeline as reinforcement learning needs it.

    Convention: t = 1 is noise, t = 0 is data, the network predicts v = e - x_0.
    """

    lora_targets: ClassVar[Sequence[str]]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        resolution: int,
        guidance: float,
        max_sequence_length: int,
    ) -> None:
        self.pipeline = pipeline
        self.resolution = resolution  # of the images, in pixels
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        for module in self._modules():
            module.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        resolution: int,
        guidance: float,
        max_sequence_length: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Read a diffusers pipeline folder of this backbone's kind; see `tafs.backbones.load`."""
        pipeline = DiffusionPipeline.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        pipeline.set_progress_bar_config(disable=True)
        # Convolutions are faster so, on processors by a third.
        pipeline.vae.to(memory_format=torch.channels_last)
        return cls(
            pipeline.to(device),
            resolution=resolution,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
        )

    # -- the network ---------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def latent_size(self) -> int:
        """Side of the latents."""
        return self.resolution // self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, [len(prompts), ...]."""
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v(x_t, t), float32 [B, ...]; t: [B] in (0, 1]."""
        raise NotImplementedError

    def decode(self, x_0: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Images of the latents, [B, 3, H, W] in [0, 1], float32; differentiable.

        `dtype` is the precision of the decoder's convolutions, by default that of its weights.
        """
        vae = self.pipeline.vae
        latents = x_0.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        with torch.autocast(latents.device.type, dtype, enabled=dtype is not None):
            decoded = vae.decode(latents, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def time_grid(self, steps: int) -> Tensor:
        """The model's own grid, [steps + 1] from 1 to 0: uniform, then the scheduler's shift."""
        return shifted(torch.linspace(1, 0, steps + 1), self.pipeline.scheduler.config.shift)

    # -- LoRA ----------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        """Attach a fresh adapter (B = 0, so the network is unchanged) in float32."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(self.lora_targets))
        self.transformer.add_adapter(config)
        for name, parameter in self.lora_parameters().items():
            parameter.data = parameter.data.float()
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, in a fixed order."""
        named = self.transformer.named_parameters()
        return {name: p for name, p in named if "lora_" in name}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model: the adapter is off inside the block."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def save_adapter(self, file: Path) -> None:
        """Write the adapter as diffusers does, its alpha included."""
        # Without the metadata diffusers forgets alpha and scales the adapter wrongly.
        metadata = _collate_lora_metadata({"transformer": self.transformer})
        for values in metadata.values():
            # A set's order changes from process to process.
            values |= {key: sorted(v) for key, v in values.items() if isinstance(v, set)}
        self.pipeline.save_lora_weights(
            file.parent,
            weight_name=file.name,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer),
            **metadata,
        )
        _sort_header(file)

    def load_adapter(self, file: Path) -> None:
        """Load an adapter that `save_adapter` or diffusers wrote, for sampling alone.

        It is merged into the weights where they are float32, which saves its products at every
        evaluation; in bfloat16 merging would round it.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such adapter")
        self.pipeline.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
        if self.transformer.dtype == torch.float32:
            self.pipeline.fuse_lora(components=["transformer"])
            self.pipeline.unload_lora_weights()

    def _modules(self) -> list[nn.Module]:
        components = self.pipeline.components.values()
        return [c for c in components if isinstance(c, nn.Module)]


def _sort_header(file: Path) -> None:
    """Give equal adapters equal bytes: safetensors writes its metadata in a random order."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the data stays aligned
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on a GPU that multiplies it in hardware, else None: the weights' own precision.

    Processors that have instructions for it still convolve faster in float32, and would differ.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None
