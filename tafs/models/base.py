"""What every backbone shares: prompts, decoding, the time grid, LoRA, saving and loading."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tafs.models.sampling import shifted

KEPT_BYTES = 4 << 30  # of prompts' embeddings in host memory, for each process
ADAPTER_NAME = re.compile(r"\.[^.]+\.weight$")  # peft's, which files do not have
TIMESTEPS = 1000  # the networks read t in [0, 1] as a timestep in [0, 1000]

# The adapted layers: every projection of the joint attention, as in Flow-GRPO's public settings for
# SD3.5-M (those for FLUX.1 add the double blocks' feed-forward layers). FLUX.1's single blocks have
# no output projection of their own, and SD3.5-M's second attention, `attn2`, stays as it is.
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

    @property
    def nbytes(self) -> int:
        """Of one batch, without `negative`."""
        return self.embeds.nbytes + self.pooled.nbytes

    def repeat_interleave(self, times: int) -> Conditioning:
        """Each prompt `times` in a row, as a group's images are laid out."""
        return self[torch.arange(len(self.embeds)).repeat_interleave(times)]


class Backbone:
    """A diffusers pipeline as reinforcement learning needs it.

    Convention: t = 1 is noise, t = 0 is data, the network predicts v = e - x_0. The network and
    the autoencoder stay on the device; the text encoders are there only while they encode.

    Raises:
        ValueError: the resolution is no whole number of the network's patches; names both.
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
        self._kept: dict[str, Conditioning] = {}  # by prompt, batches of one in host memory
        patch = self.patch_size * pipeline.vae_scale_factor
        if resolution % patch:
            raise ValueError(
                f"resolution: {resolution} is not a multiple of {patch}, "
                "the pixels of one of this model's patches"
            )
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
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> Self:
        """Read a diffusers pipeline folder of this backbone's kind; see `tafs.models.loading.load`.

        Args:
            dtype: of the network's and the text encoders' weights; an adapter is float32.
            vae_dtype: of the autoencoder's weights; see also `decode`.
            gradient_checkpointing: keep only the blocks' inputs for the backward pass, which
                computes the rest again with the weights that it finds: an evaluation with
                gradients must not stand inside `reference()`.
            compile: compile the network's blocks at their first use. Evaluations with and without
                gradients are compiled apart and may differ in rounding, so that the first ratios
                of a policy are no longer exactly 1.
        """
        pipeline = DiffusionPipeline.from_pretrained(
            path,
            dtype={"default": dtype, "vae": vae_dtype},
            local_files_only=True,
            use_safetensors=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        # Convolutions are faster so, on processors by a third.
        pipeline.vae.to(memory_format=torch.channels_last)
        backbone = cls(
            pipeline,
            resolution=resolution,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
        )
        for module in (pipeline.transformer, pipeline.vae):
            module.to(device)
            if gradient_checkpointing:
                module.enable_gradient_checkpointing()
        if compile:
            for block in backbone.blocks:
                block.compile()
        return backbone

    # -- the prompts ---------------------------------------------------------------------------

    @property
    def negative_prompt(self) -> str | None:
        """What classifier-free guidance points away from; None where there is no such guidance."""
        return None

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders, where they are, on one batch; differentiable.

        Returns:
            Conditioning of the prompts, [len(prompts), ...], without `negative`.
        """
        raise NotImplementedError

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode those of the prompts that are not kept, and keep them in host memory.

        Other prompts are forgotten, the oldest first, where all together take more than
        KEPT_BYTES: one of 512 tokens takes 4 MiB of FLUX.1-dev's embeddings in bfloat16.
        """
        wanted = dict.fromkeys(self._with_negative(prompts))
        size = sum(kept.nbytes for kept in self._kept.values())
        for prompt in [prompt for prompt in self._kept if prompt not in wanted]:
            if size <= KEPT_BYTES:
                break
            size -= self._kept.pop(prompt).nbytes
        self._keep(list(wanted))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts on the device, [len(prompts), ...], without gradients.

        Each prompt was encoded in a batch of its own, so that the same prompt has the same bits
        whatever else is encoded. Those that are not kept are encoded first, and kept.
        """
        self._keep(self._with_negative(prompts))
        distinct = list(dict.fromkeys(prompts))
        conditioning = self._on_device(distinct)
        if len(distinct) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(distinct)}
            conditioning = conditioning[[place[prompt] for prompt in prompts]]
        if self.negative_prompt is None:
            return conditioning
        negative = self._on_device([self.negative_prompt])
        return replace(
            conditioning,
            negative=Conditioning(
                negative.embeds.expand(len(prompts), -1, -1),
                negative.pooled.expand(len(prompts), -1),
            ),
        )

    def _with_negative(self, prompts: Sequence[str]) -> list[str]:
        return [*prompts, *([] if self.negative_prompt is None else [self.negative_prompt])]

    @torch.no_grad()
    def _keep(self, prompts: Sequence[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if not missing:
            return
        with self._encoders_on_device():
            for prompt in missing:
                embedded = self.embed([prompt])
                self._kept[prompt] = Conditioning(_host(embedded.embeds), _host(embedded.pooled))

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        encoders = [
            component
            for name, component in self.pipeline.components.items()
            if name.startswith("text_encoder") and component is not None
        ]
        for encoder in encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        kept = [self._kept[prompt] for prompt in prompts]
        return Conditioning(
            torch.cat([one.embeds.to(self.device, non_blocking=True) for one in kept]),
            torch.cat([one.pooled.to(self.device, non_blocking=True) for one in kept]),
        )

    # -- the network ---------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's repeated blocks."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        """Side of a token's patch of latents."""
        raise NotImplementedError

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

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v(x_t, t), float32 [B, ...]; t: [B] in (0, 1]."""
        raise NotImplementedError

    def decode(self, x_0: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Images of the latents, [B, 3, H, W] in [0, 1], float32; differentiable.

        `dtype` is the precision of the decoder's convolutions, by default that of its weights.
        """
        vae = self.pipeline.vae
        latents = x_0.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        with torch.autocast(latents.device.type, dtype, enabled=dtype is not None):
            decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def time_grid(self, steps: int) -> Tensor:
        """The model's own grid, [steps + 1] from 1 to 0: uniform, then the scheduler's shift."""
        return shifted(torch.linspace(1, 0, steps + 1), self.pipeline.scheduler.config.shift)

    # -- LoRA ----------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        """Attach a fresh adapter (B = 0, so the network is unchanged) in float32.

        `generator` is one of the CPU, so that the adapter is the same on every device.
        """
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(self.lora_targets))
        self.transformer.add_adapter(config)
        for name, parameter in self.lora_parameters().items():
            values = torch.zeros(parameter.shape)
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(values, -bound, bound, generator=generator)
            parameter.data = values.to(parameter.device)

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

        Raises:
            FileNotFoundError, ValueError: there is none, or it is damaged; names the file.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such adapter")
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file}: no safetensors file ({error}); train the run again"
            ) from None
        # Without `use_safetensors` diffusers would read it as something else.
        self.pipeline.load_lora_weights(
            file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True
        )
        if self.transformer.dtype == torch.float32:
            self.pipeline.fuse_lora(components=["transformer"])
            self.pipeline.unload_lora_weights()
            return
        # diffusers reads it in the network's precision.
        saved = load_file(file)
        for name, parameter in self.lora_parameters().items():
            values = saved["transformer." + ADAPTER_NAME.sub(".weight", name)]
            parameter.data = values.float().to(parameter.device)

    def _modules(self) -> list[nn.Module]:
        components = self.pipeline.components.values()
        return [c for c in components if isinstance(c, nn.Module)]


def _host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, pinned where it comes from a GPU."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


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
