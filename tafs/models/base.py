"""The base class of trainable models: prompts, network, decoding, time grid and LoRA adapters.

All of it is one file, because it is one class, whose parts share the pipeline and its device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor, nn

from tafs.models import adapters, attention, quantization
from tafs.models.conditioning import Conditioning
from tafs.models.embeddings import Embeddings
from tafs.models.sampling import shifted

# diffusers and peft are imported where they are used: they take seconds, and all methods import
# this module.
if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KEPT_BYTES = 4 << 30  # memory for prompt embeddings on the host, per process
ROOM_BYTES = 2 << 30  # device memory for the activations of text encoders
DECODED_PIXELS = 1 << 20  # that go through the decoder together: four images of 512 x 512
TIMESTEPS = 1000  # many networks take t in [0, 1] as a timestep in [0, 1000]

# cuDNN's attention, PyTorch's default on H100 and H200 since 2.11, can return NaN gradients
# (https://github.com/pytorch/pytorch/issues/196678; seen with FLUX.1-dev), so it is not used.
torch.backends.cuda.enable_cudnn_sdp(False)

# The adapted layers of networks with joint attention: all of its projections, as in Flow-GRPO's
# public settings for SD3.5-M (those for FLUX.1 add the feed-forward layers of the double blocks).
# The single blocks of FLUX.1 have no attention output projection; the second attention of SD3.5-M,
# `attn2`, is not adapted.
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


class Backbone:
    """A diffusers pipeline with the interface that training needs.

    Convention: t = 1 is noise, t = 0 is data, and the network predicts v = e - x_0. The network and
    the autoencoder stay on the device; the text encoders are on it only while they encode. Where
    its memory does not hold both, the former, and the modules in `waiting`, wait in host memory
    meanwhile.

    A subclass sets `lora_targets`, implements `embed` and `network`, and overrides the properties
    that differ for its architecture.

    Args:
        pipeline: the pipeline, all of whose modules are frozen.
        resolution: of the images, in pixels.
        guidance: the guidance scale.
        max_sequence_length: of the long text encoder, in tokens.

    Raises:
        ValueError: the resolution is not a multiple of the patch size in pixels; names both.
    """

    base_model: str | None = None  # the name that adapters' files state
    compiled: bool = False
    quantized: bool = False
    embeddings: Embeddings | None = None  # where embeddings are stored
    waiting: Sequence[nn.Module] = ()  # others on the device, not used while prompts are encoded
    _load_encoders: Callable[[], DiffusionPipeline] | None = None  # if they are not loaded yet

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        resolution: int,
        guidance: float,
        max_sequence_length: int,
    ) -> None:
        self.pipeline = pipeline
        self.resolution = resolution
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        self._kept: dict[str, Conditioning] = {}  # by prompt, batches of one in host memory
        patch = self.patch_size * pipeline.vae_scale_factor
        if resolution % patch:
            raise ValueError(
                f"resolution: {resolution} is not a multiple of {patch}, "
                "the side of this model's patches in pixels"
            )
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

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
        quantize: quantization.Quantization = "none",
        attention_backend: attention.Attention = "native",
        embeddings: Path | None = None,
    ) -> Self:
        """Load a diffusers pipeline folder; `tafs.models.loading.load` selects the subclass.

        Args:
            path: the folder.
            resolution, guidance, max_sequence_length: as for the class.
            device: of the network and the autoencoder.
            dtype: of the network's and the text encoders' weights; adapters are float32.
            vae_dtype: of the autoencoder's weights; see also `decode`.
            gradient_checkpointing: recompute the blocks of the network in the backward pass. This
                uses the weights of that moment, so evaluations with gradients are not allowed
                inside `reference()`. The autoencoder's blocks are always recomputed, if it supports
                that.
            quantize: the format that the linear layers of the network's blocks are quantised to.
            attention_backend: what computes the network's attention; see `attention.choose`.
            embeddings: the folder in which prompt embeddings are stored; see `Embeddings`. The text
                encoders are then loaded when a prompt has to be encoded.

        Raises:
            ValueError: a library that quantises or computes attention is missing; names it.
        """
        from diffusers import DiffusionPipeline

        read = partial(
            DiffusionPipeline.from_pretrained,
            path,
            dtype={"default": dtype, "vae": vae_dtype},
            local_files_only=True,
            use_safetensors=True,
        )
        later = {} if embeddings is None else dict.fromkeys(_text_encoders(path))
        pipeline = read(**later)
        pipeline.set_progress_bar_config(disable=True)
        # Convolutions are faster with channels last, on CPUs by a third.
        pipeline.vae.to(memory_format=torch.channels_last)
        backbone = cls(
            pipeline,
            resolution=resolution,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
        )
        backbone.base_model = _model_name(path)
        if embeddings is not None:
            backbone.embeddings = Embeddings(embeddings)
            backbone._load_encoders = partial(read, transformer=None, vae=None)
        quantization.quantize(backbone.blocks, quantize, device)
        backbone.quantized = quantize != "none"
        for module in (pipeline.transformer, pipeline.vae):
            module.to(device)
        attention.choose(pipeline.transformer, attention_backend)
        if gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        # Its activations at full size would take most of the memory of rewards' gradients.
        if pipeline.vae._supports_gradient_checkpointing:  # AutoencoderDC does not
            pipeline.vae.enable_gradient_checkpointing()
        return backbone

    def compile(self) -> None:
        """Compile the network's blocks and the decoder at first use with each shape of their input.

        Evaluations with and without gradients are compiled separately and round differently.
        Decoding with gradients is not compiled.
        """
        # Besides shapes, the adapter's state and gradient checkpointing count as variants.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile()
        self.pipeline.vae.decoder.compile()
        self.compiled = True

    @property
    def lora_targets(self) -> Sequence[str]:
        """The names, or their last parts, of the adapted layers."""
        raise NotImplementedError

    @property
    def negative_prompt(self) -> str | None:
        """The negative prompt of classifier-free guidance; None without such guidance."""
        return None

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of one batch, without `negative`; differentiable.

        The text encoders run on their current device.
        """
        raise NotImplementedError

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not cached yet, and cache them in host memory.

        Other prompts are dropped, the oldest first, while the cache exceeds KEPT_BYTES: a prompt of
        512 tokens takes 4 MiB for FLUX.1-dev in bfloat16.
        """
        wanted = dict.fromkeys(self._with_negative(prompts))
        size = sum(kept.nbytes for kept in self._kept.values())
        for prompt in [prompt for prompt in self._kept if prompt not in wanted]:
            if size <= KEPT_BYTES:
                break
            size -= self._kept.pop(prompt).nbytes
        self._keep(list(wanted))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of the prompts on the device, without gradients.

        Each prompt is encoded in its own batch, once: its embeddings have the same bits whichever
        other prompts are encoded.
        """
        self._keep(self._with_negative(prompts))
        distinct = list(dict.fromkeys(prompts))
        conditioning = self._on_device(distinct)
        if len(distinct) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(distinct)}
            conditioning = conditioning[[place[prompt] for prompt in prompts]]
        if self.negative_prompt is None:
            return conditioning
        one = self._on_device([self.negative_prompt])
        negative = one.map(lambda tensor: tensor.expand(len(prompts), *tensor.shape[1:]))
        return replace(conditioning, negative=negative)

    def _with_negative(self, prompts: Sequence[str]) -> list[str]:
        return [*prompts, *([] if self.negative_prompt is None else [self.negative_prompt])]

    @torch.no_grad()
    def _keep(self, prompts: Sequence[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if not missing:
            return
        if self.embeddings is not None:
            for prompt in missing:
                if (stored := self.embeddings.read(prompt)) is not None:
                    self._kept[prompt] = stored.map(self._pinned)
            missing = [prompt for prompt in missing if prompt not in self._kept]
            if not missing:
                return
        with self._encoders_on_device():
            for prompt in missing:
                self._kept[prompt] = self.embed([prompt]).map(_host)
                if self.embeddings is not None:
                    self.embeddings.write(prompt, self._kept[prompt])

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def load_encoders(self) -> None:
        """Load the text encoders, if they were left out."""
        if self._load_encoders is None:
            return
        for name, module in self._load_encoders().components.items():
            if name.startswith("text_encoder") and module is not None:
                self.pipeline.register_modules(**{name: module.eval().requires_grad_(False)})
        self._load_encoders = None

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        self.load_encoders()
        components, device = self.pipeline.components.items(), self.device
        encoders = [c for name, c in components if name.startswith("text_encoder") and c]
        waiting = [self.transformer, self.pipeline.vae, *self.waiting]
        if _fit(encoders, device):
            waiting = []
        for module in waiting:
            module.to("cpu")
        for encoder in encoders:
            encoder.to(device)
        try:
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")
            for module in waiting:
                module.to(device)

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        kept = [self._kept[prompt] for prompt in prompts]
        return Conditioning.cat(
            [one.map(lambda tensor: tensor.to(self.device, non_blocking=True)) for one in kept]
        )

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's repeated blocks."""
        return list(self.transformer.transformer_blocks)

    @property
    def patch_size(self) -> int:
        """The side of a token's patch, in latents."""
        return self.transformer.config.patch_size

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def latent_size(self) -> int:
        """The height and width of an image's latents."""
        return self.resolution // self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of an image's latents, without the batch dimension."""
        return (self.transformer.config.in_channels, self.latent_size, self.latent_size)

    def network(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity e - x_0 without classifier-free guidance, like x_t.

        Args:
            x_t: [B, *latent_shape], float32.
            t: [B] in (0, 1].
            cond: of the B images; `negative` is ignored.
        """
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return v(x_t, t) with guidance, float32; arguments and shapes as for `network`.

        With classifier-free guidance, both prompts are evaluated in one batch.
        """
        if cond.negative is None:
            return self.network(x_t, t, cond)
        both = Conditioning.cat([cond.negative, cond])
        v = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        negative, positive = v.chunk(2)
        return negative + self.guidance * (positive - negative)

    def decode(self, x_0: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Decode latents [B, *latent_shape] to images [B, 3, H, W] in [0, 1]; differentiable.

        Large batches are decoded in parts, so that they do not decide how much memory is needed.
        `dtype` is the precision of the decoder's convolutions; by default that of its weights.
        """
        vae, latents = self.pipeline.vae, self.scaled(x_0.float())
        eager = self.compiled and torch.is_grad_enabled()
        with (
            torch.compiler.set_stance("force_eager") if eager else nullcontext(),
            torch.autocast(latents.device.type, dtype, enabled=dtype is not None),
        ):
            decoded = [
                vae.decode(part.to(vae.dtype), return_dict=False)[0]
                for part in latents.split(decoded_together(self.resolution))
            ]
        images = decoded[0] if len(decoded) == 1 else torch.cat(decoded)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def scaled(self, x_0: Tensor) -> Tensor:
        """Return float32 latents [B, *latent_shape] as the autoencoder decodes them."""
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0  # some autoencoders have no shift
        return x_0 / config.scaling_factor + shift

    def time_grid(self, steps: int) -> Tensor:
        """Return the model's own time grid from 1 to 0, [steps + 1]: uniform, then shifted.

        The shift is the scheduler's `shift`, or `flow_shift` of a multistep solver.
        """
        config = self.pipeline.scheduler.config
        shift = config.shift if "shift" in config else config.flow_shift
        return shifted(torch.linspace(1, 0, steps + 1), shift)

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        """Attach a new float32 adapter; its B matrices are 0, so that the output is unchanged.

        With a CPU generator the adapter is the same on all devices.
        """
        from peft import LoraConfig

        from tafs.models import lora

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(self.lora_targets))
        self.transformer.add_adapter(config)
        lora.install(self.transformer)
        for name, parameter in self.lora_parameters().items():
            values = torch.zeros(parameter.shape)
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(values, -bound, bound, generator=generator)
            parameter.data = values.to(parameter.device)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name, in a fixed order."""
        named = self.transformer.named_parameters()
        return {name: p for name, p in named if "lora_" in name}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Evaluate the base model: the adapter is off inside the `with` block."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def save_adapter(self, file: Path) -> None:
        """Save the adapter in diffusers' format, so that it adds B A to a layer's weights.

        The saved B is alpha / rank times the trained one, and the header's alpha is the rank: all
        programs then load the adapter with the strength of training, also those that do not read
        alpha or expect it elsewhere. The multiplication is exact if alpha / rank is a power of two;
        otherwise each value is rounded once, by at most 2^-24 of itself.

        The header holds the arguments of peft's `LoraConfig`, with the layers (`target_modules`)
        and the base model's name.
        """
        from peft import get_peft_model_state_dict

        config = self.transformer.peft_config["default"]
        layers = get_peft_model_state_dict(self.transformer)
        for name in layers:
            if name.endswith("lora_B.weight"):
                layers[name] = layers[name] * (config.lora_alpha / config.r)
        header = config.to_dict()
        header |= {"lora_alpha": config.r, "base_model_name_or_path": self.base_model}
        # The order of a set differs between processes.
        header |= {key: sorted(v) for key, v in header.items() if isinstance(v, set)}
        self.pipeline.save_lora_weights(
            file.parent,
            weight_name=file.name,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=header,
        )
        _sort_header(file)

    def load_adapter(self, file: Path) -> None:
        """Load an adapter that `save_adapter`, `adapters.write` or diffusers wrote, for sampling.

        It is merged into float32 weights, which makes sampling faster; bfloat16 and quantised
        weights would round it, so there it stays separate.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: the file cannot be read.
            ValueError: the file is not a safetensors file.
        """
        if adapters.components(file) != [adapters.TRANSFORMER]:
            self.load_encoders()
        components = adapters.attach(self.pipeline, file)
        if components != [adapters.TRANSFORMER]:
            self._kept.clear()  # the text encoders have changed
            self.embeddings = None
        if self.transformer.dtype == torch.float32 and not self.quantized:
            self.pipeline.fuse_lora(components=components)
            self.pipeline.unload_lora_weights()
        else:
            adapters.restore_precision(self.pipeline, file, components)


def decoded_together(resolution: int) -> int:
    """The most images of `resolution` pixels that go through the decoder together."""
    return max(1, DECODED_PIXELS // resolution**2)


def _fit(modules: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether the device's memory has room for modules and their activations."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = sum(tensor.nbytes for module in modules for tensor in module.parameters())
    return needed + ROOM_BYTES <= free + cached


def _host(tensor: Tensor) -> Tensor:
    """Return the tensor in host memory, pinned if it was on a GPU."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


def _text_encoders(folder: Path) -> list[str]:
    """The names of the text encoders in a pipeline's folder."""
    index = json.loads((folder / "model_index.json").read_bytes())
    return [name for name in index if name.startswith("text_encoder") and all(index[name])]


def _model_name(folder: Path) -> str:
    """Return OWNER/NAME for a snapshot in Hugging Face's cache, else the folder's name."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _sort_header(file: Path) -> None:
    """Sort the metadata, which safetensors writes in random order, so that files are equal."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the data stays aligned
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for GPUs that support it in hardware, else None (the weights' precision).

    CPUs with bfloat16 instructions still convolve faster in float32, and would give other results.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None
