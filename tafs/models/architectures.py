"""Architectures of the known networks, and their sizes computed from the configuration alone.

The FLOPs are those of matrix products and attention, two per multiply-add, as torch's
FlopCounterMode counts them; the tests compare the two (tafs/models/flops.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tafs.models import catalog

CLIP_TOKENS = 77  # tokens per prompt of Stable Diffusion 3's CLIP text encoders
TIME_CHANNELS = 256  # of the sinusoidal embedding of times and guidance


@dataclass(frozen=True)
class Architecture:
    """The configuration files of a model's repository."""

    title: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokens: int  # length of a prompt's embeddings


def vae(
    channels: Sequence[int], layers: int, groups: int, latents: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an autoencoder's configuration; `latents` are fields that differ between models."""
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "latent_channels": 16,
        "norm_num_groups": groups,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **latents,
    }


FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX2_LATENTS = {"latent_channels": 32, "use_quant_conv": True, "use_post_quant_conv": True}
SD3_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
SD3_SCHEDULER = {"shift": 3.0}
PUBLISHED_VAE: dict[str, Any] = {"channels": (128, 256, 512, 512), "layers": 2, "groups": 32}

FLUX_DEV = Architecture(
    title="FLUX.1-dev",
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae=vae(**PUBLISHED_VAE, latents=FLUX_LATENTS),
    scheduler=FLUX_SCHEDULER,
    tokens=512,
)
# The text encoder's embeddings are three layers of a Qwen3-4B, side by side.
FLUX2_KLEIN_BASE_4B = Architecture(
    title="FLUX.2-klein-base-4B",
    transformer={
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "guidance_embeds": False,
        "axes_dims_rope": (32, 32, 32, 32),
    },
    vae=vae(**PUBLISHED_VAE, latents=FLUX2_LATENTS),
    scheduler=FLUX_SCHEDULER,
    tokens=512,
)
SD35_MEDIUM = Architecture(
    title="SD3.5-Medium",
    transformer={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae=vae(**PUBLISHED_VAE, latents=SD3_LATENTS),
    scheduler=SD3_SCHEDULER,
    tokens=CLIP_TOKENS + 256,  # CLIP and T5
)
SD35_LARGE = replace(
    SD35_MEDIUM,
    title="SD3.5-Large",
    transformer={
        **SD35_MEDIUM.transformer,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": (),
    },
)
HIDREAM = Architecture(
    title="HiDream-I1",
    transformer={
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": (4096, 4096),
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": (*range(32), *(31,) * 16),
    },
    vae=vae(**PUBLISHED_VAE, latents=FLUX_LATENTS),
    scheduler=SD3_SCHEDULER,
    tokens=128,
)
SANA = Architecture(
    title="SANA-1.5 1.6B",
    transformer={
        "patch_size": 1,
        "in_channels": 32,
        "num_layers": 20,
        "attention_head_dim": 32,
        "num_attention_heads": 70,
        "cross_attention_dim": 2240,
        "cross_attention_head_dim": 112,
        "num_cross_attention_heads": 20,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "qk_norm": "rms_norm_across_heads",
        "guidance_embeds": False,
    },
    vae={"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)},
    scheduler=SD3_SCHEDULER,
    tokens=300,
)
# By the `resource` of a catalogue entry.
PUBLISHED = {
    "flux-dev": FLUX_DEV,
    "flux-schnell": replace(
        FLUX_DEV,
        title="FLUX.1-schnell",
        transformer={**FLUX_DEV.transformer, "guidance_embeds": False},
        tokens=256,
    ),
    "flux2-klein-base-4b": FLUX2_KLEIN_BASE_4B,
    "sd35-medium": SD35_MEDIUM,
    "sd35-large": SD35_LARGE,
    "sd35-large-turbo": replace(SD35_LARGE, title="SD3.5-Large-Turbo"),
    "hidream-full": HIDREAM,
    "hidream-fast": HIDREAM,
    "sana-1.5": SANA,
    "sana-sprint": replace(
        SANA,
        title="SANA-Sprint 1.6B",
        transformer={**SANA.transformer, "guidance_embeds": True},
    ),
}


def published(model: catalog.Model, length: int | None) -> Architecture | None:
    """The architecture of a model of the hub; None if it is not known.

    Args:
        model: the catalogue's entry.
        length: of the prompts, in tokens; None: the pipeline chooses it.
    """
    found = PUBLISHED.get(model.resource)
    if found is None or length is None or model.max_sequence_length is None:
        return found
    return replace(found, tokens=found.tokens - (model.max_sequence_length - length))


def of_folder(folder: Path, model: catalog.Model) -> Architecture:
    """Read the architecture from a pipeline folder's configuration files.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
    """

    def read(part: str) -> dict[str, Any]:
        content = json.loads((folder / part).read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if not key.startswith("_")}

    _, tokens = model.conditioning
    if model.pipeline == "StableDiffusion3Pipeline":
        tokens += read("tokenizer/tokenizer_config.json")["model_max_length"]
    return Architecture(
        title=model.title,
        transformer=read("transformer/config.json"),
        vae=read("vae/config.json"),
        scheduler=read("scheduler/scheduler_config.json"),
        tokens=tokens,
    )


@dataclass(frozen=True)
class Size:
    """The size of a network."""

    forward: float  # FLOPs of one evaluation of one image, guidance included
    adapter: int  # parameters of its LoRA adapter
    weights: int  # its own parameters, and the table of positions of Stable Diffusion 3
    matrices: int  # those of them in linear layers of the blocks, without biases
    largest: int  # the most in one of these layers


def size(
    architecture: Architecture, model: catalog.Model, resolution: int, lora_rank: int | None
) -> Size:
    """Return the size of a network with its adapter on the `lora_targets` of its backbone.

    Args:
        architecture: its configuration.
        model: the catalogue's entry, of a pipeline in `SIZES`.
        resolution: of the images, in pixels.
        lora_rank: None: no adapter.
    """
    latent = _latent(architecture, resolution)
    config, text = architecture.transformer, architecture.tokens
    found = SIZES[model.pipeline](config, latent, text, lora_rank or 0)
    return replace(found, forward=found.forward * evaluations(model))


def forward(
    architecture: Architecture, model: catalog.Model, resolution: int, lora_rank: int | None
) -> float | None:
    """Return the FLOPs of one evaluation of one image, guidance included; None: not known.

    The arguments are those of `size`; models of the pipelines in `COMPARED` have no adapter.
    """
    if model.pipeline in SIZES:
        return size(architecture, model, resolution, lora_rank).forward
    if model.pipeline not in COMPARED:
        return None
    latent = _latent(architecture, resolution)
    found = COMPARED[model.pipeline](architecture.transformer, latent, architecture.tokens)
    return evaluations(model) * found


def _latent(architecture: Architecture, resolution: int) -> int:
    """The side of an image's latents."""
    vae = architecture.vae
    stages = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return resolution // 2 ** (len(stages) - 1)


def evaluations(model: catalog.Model) -> int:
    """Evaluations of the network per velocity: two with classifier-free guidance."""
    return 2 if model.pipeline in GUIDED and (model.guidance or 1) > 1 else 1


def _attention(tokens: int, width: int) -> int:
    return 4 * tokens**2 * width


def _flux(config: Mapping[str, Any], latent: int, text: int, rank: int) -> Size:
    d = config["num_attention_heads"] * config["attention_head_dim"]
    channels, context = config["in_channels"], config["joint_attention_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    image = (latent // 2) ** 2
    tokens = image + text
    # Per token: queries, keys, values and output, and a feed-forward layer four times as wide.
    # Modulation is computed once per image: for both streams of a double block.
    blocks = (double + single) * (2 * tokens * 12 * d**2 + _attention(tokens, d))
    blocks += double * 2 * 2 * 6 * d**2 + single * 2 * 3 * d**2
    ends = 2 * (image * 2 * channels * d + text * context * d)
    embeddings = (2 if config["guidance_embeds"] else 1) * (TIME_CHANNELS + d)
    embeddings += config["pooled_projection_dim"] + d + 2 * d
    adapter = 2 * d * rank * (double * 8 + single * 3)
    adapted = 2 * tokens * 2 * d * rank * (double * 4 + single * 3)
    # The same matrices with their biases, and the norms of queries and keys.
    weights = double * 2 * (18 * d**2 + 15 * d) + single * (15 * d**2 + 11 * d)
    weights += (double * 4 + single * 2) * config["attention_head_dim"]
    weights += (channels + 1 + context + 1) * d + channels * (d + 1)
    weights += embeddings * d + (3 if config["guidance_embeds"] else 2) * 2 * d + 2 * d
    matrices = (double * 2 * 18 + single * 15) * d**2
    forward = float(blocks + ends + 2 * embeddings * d + adapted)
    return Size(forward, adapter, weights, matrices, largest=6 * d**2)


def _flux2_klein(config: Mapping[str, Any], latent: int, text: int, rank: int) -> Size:
    d = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = int(config["mlp_ratio"] * d)
    channels, context = config["in_channels"], config["joint_attention_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    image = (latent // 2) ** 2
    tokens = image + text
    # Per token: queries, keys, values and output, and a gated feed-forward layer.
    layers = 4 * d**2 + 3 * d * hidden
    blocks = (double + single) * (2 * tokens * layers + _attention(tokens, d))
    # Once per image: the modulation that all blocks of a kind share, that of the output, and time.
    shared = (6 + 6 + 3 + 2) * d**2 + TIME_CHANNELS * d + d**2
    ends = 2 * (image * 2 * channels * d + text * context * d)
    # Widths of the adapted products, input and output: a double block's eight, four of which see a
    # token; a single block's first, with the feed-forward layer's input, and its second.
    fused = d + 3 * d + 2 * hidden + d + hidden + d
    adapter = rank * (double * 8 * 2 * d + single * fused)
    adapted = 2 * tokens * rank * (double * 4 * 2 * d + single * fused)
    # The same matrices, without biases, and the norms of queries and keys.
    matrices = double * (8 * d**2 + 6 * d * hidden) + single * layers
    weights = matrices + shared
    weights += (double * 4 + single * 2) * config["attention_head_dim"] + (
        2 * channels + context
    ) * d
    forward = float(blocks + 2 * shared + ends + adapted)
    return Size(forward, adapter, weights, matrices, largest=d * (3 * d + 2 * hidden))


def _sd3(config: Mapping[str, Any], latent: int, text: int, rank: int) -> Size:
    d = config["num_attention_heads"] * config["attention_head_dim"]
    layers, dual = config["num_layers"], len(config["dual_attention_layers"])
    patch = config["patch_size"] ** 2
    image = (latent // config["patch_size"]) ** 2
    tokens = image + text
    blocks = layers * (2 * tokens * 12 * d**2 + _attention(tokens, d) + 2 * 2 * 6 * d**2)
    # The last block computes no output of the text: no projection and feed-forward layer, and a
    # modulation of 2 instead of 6 parts.
    blocks -= 2 * text * 9 * d**2 + 2 * 4 * d**2
    # A second attention, over image tokens, with a modulation of 3 more parts.
    blocks += dual * (2 * image * 4 * d**2 + _attention(image, d) + 2 * 3 * d**2)
    ends = 2 * d * image * patch * (config["in_channels"] + config["out_channels"])
    ends += 2 * d * text * config["joint_attention_dim"]
    embeddings = TIME_CHANNELS + d + config["pooled_projection_dim"] + d + 2 * d
    adapter = 2 * d * rank * (layers * 8 - 1)
    adapted = 2 * 2 * d * rank * (layers * 4 * tokens - text)
    weights = layers * 2 * (18 * d**2 + 15 * d) - (13 * d**2 + 10 * d) + dual * 7 * (d**2 + d)
    weights += (layers * 4 + dual * 2) * (config["attention_head_dim"] if config["qk_norm"] else 0)
    weights += (config["in_channels"] * patch + 1 + config["joint_attention_dim"] + 1) * d
    weights += config["out_channels"] * patch * (d + 1) + embeddings * d + 2 * 2 * d + 2 * d
    weights += config["pos_embed_max_size"] ** 2 * d
    matrices = (layers * 2 * 18 - 13 + dual * 7) * d**2
    forward = float(blocks + ends + 2 * embeddings * d + adapted)
    return Size(forward, adapter, weights, matrices, largest=(9 if dual else 6) * d**2)


def _hidream(config: Mapping[str, Any], latent: int, text: int) -> float:
    d = config["num_attention_heads"] * config["attention_head_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    patch = config["patch_size"] ** 2
    image = (latent // config["patch_size"]) ** 2
    # Tokens of T5 and of Llama's last layer, and in every block those of one more of its layers.
    prompt = 3 * text
    tokens = image + prompt

    def gated(hidden: int) -> int:
        """Of a token: a gated feed-forward layer, of two thirds of `hidden`."""
        return 2 * 3 * d * 256 * -(-int(2 * hidden / 3) // 256)

    # Of a token: some of the experts, the one that all tokens share, and the choice.
    experts = config["num_activated_experts"] * gated(4 * d) + gated(2 * d)
    experts += 2 * d * config["num_routed_experts"]
    attention = 2 * tokens * 4 * d**2 + _attention(tokens, d)
    blocks = double * (attention + image * experts + prompt * gated(4 * d) + 2 * 12 * d**2)
    blocks += single * (attention + tokens * experts + 2 * 6 * d**2)
    t5, llama = config["caption_channels"]
    ends = 2 * text * d * ((double + single) * llama + t5)
    ends += 2 * image * patch * d * 2 * config["in_channels"]
    embeddings = TIME_CHANNELS + d + config["text_emb_dim"] + d + 2 * d
    return float(blocks + ends + 2 * embeddings * d)


def _sana(config: Mapping[str, Any], latent: int, text: int) -> float:
    head = config["attention_head_dim"]
    d = config["num_attention_heads"] * head
    hidden = int(config["mlp_ratio"] * d)
    channels, context = config["in_channels"], config["caption_channels"]
    image = latent**2
    # Per image token: queries, keys, values and output of an attention that is linear in the
    # number of tokens; queries and output of one to the text; a gated layer with convolutions.
    layers = 2 * 4 * d**2 + 4 * d * (head + 1) + 2 * 2 * d**2
    layers += 2 * (2 * d * hidden + 2 * 9 * hidden + hidden * d)
    block = image * layers + 2 * text * 2 * config["cross_attention_dim"] * d + 4 * image * text * d
    ends = 2 * (image * 2 * channels * d + text * (context + d) * d)
    embeddings = (2 if config["guidance_embeds"] else 1) * (TIME_CHANNELS + d) + 6 * d
    return float(config["num_layers"] * block + ends + 2 * embeddings * d)


# Pipelines whose guidance evaluates the network twice.
GUIDED = ("Flux2KleinPipeline", "HiDreamImagePipeline", "SanaPipeline", "StableDiffusion3Pipeline")
SIZES: Mapping[str, Callable[[Mapping[str, Any], int, int, int], Size]] = {
    "Flux2KleinPipeline": _flux2_klein,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
}
# Of the pipelines that are only compared: the FLOPs of one evaluation.
COMPARED: Mapping[str, Callable[[Mapping[str, Any], int, int], float]] = {
    "HiDreamImagePipeline": _hidream,
    "SanaPipeline": _sana,
    "SanaSprintPipeline": _sana,
}
