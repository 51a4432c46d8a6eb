"""The memory that a training takes on a GPU, as a sum of parts computed from the configuration.

The parts are those that PyTorch allocates, in bytes: weights, the adapter with its optimiser, and
the activations of the moment at which they are largest. Activations are counted as autograd saves
them: for every operation, the tensors that its derivative needs. Weights of frozen layers are
there anyway, and their inputs are not saved. A stream is a tensor [tokens, width] of the network.

`python benchmarks/memory_model.py` compares the sums with measured peaks. Not counted: the CUDA
context, fragments and communication buffers (`RESERVED`), and workspaces of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from tafs.models import architectures, catalog, quantization
from tafs.models.architectures import Architecture
from tafs.models.quantization import Quantization

FLOAT = 4  # bytes of a float32 value
HALF = 2  # bytes of a bfloat16 value
GB = 1e9
RESERVED = 0.05  # share of a GPU's memory for what is not counted; an assumption


@dataclass(frozen=True)
class Setting:
    """What the memory of a training depends on besides the model.

    Args:
        resolution: of the images, in pixels.
        lora_rank: of the adapter.
        micro_batch: images per pass of the network.
        gradient_checkpointing: whether only the inputs of the network's blocks are kept.
        weight_bytes: of one of the network's weights, where they are not quantised.
        quantize: the format of the weights in the network's blocks.
        images: of one iteration in this process.
        trained_steps: evaluations with gradients per image.
        kept_images: whose graphs are kept until the first update; 0: none.
        score_ahead: whether images are decoded and scored while others are sampled.
        rewards: bytes of the reward models' weights.
        reward_activations: bytes per image that the rewards' gradients need; None: the method does
            not differentiate the rewards.
        retained: whether all of that stays in memory until the last gradient is taken, as where
            each reward's gradient is taken alone.
        text_encoders: bytes of their weights.
        decoded: the most images that go through the decoder together; None: the micro-batch.
    """

    resolution: int
    lora_rank: int
    micro_batch: int
    gradient_checkpointing: bool
    weight_bytes: int = HALF
    quantize: Quantization = "none"
    images: int = 0
    trained_steps: int = 1
    kept_images: int = 0
    score_ahead: bool = False
    rewards: float = 0.0
    reward_activations: float | None = None
    retained: bool = True
    text_encoders: float = 0.0
    decoded: int | None = None


@dataclass(frozen=True)
class Block:
    """Bytes of one image in one of the network's blocks."""

    given: float  # the input, all that gradient checkpointing keeps
    result: float  # the output
    saved: float  # for the backward pass, with the input
    gradients: float  # the largest gradients beside them
    forward: float  # the most without gradients


@dataclass(frozen=True)
class Decoder:
    """Bytes of one image in the autoencoder's decoder."""

    forward: float  # the most without gradients
    given: float  # the inputs of its blocks, all that gradient checkpointing keeps of them
    last: float  # saved for the backward pass of the last block, the largest
    ends: float  # saved for the backward pass of the layers behind it
    gradients: float  # the largest gradients beside them


def blocks(
    architecture: Architecture, model: catalog.Model, resolution: int, rank: int, weight_bytes: int
) -> list[Block]:
    """The blocks of a network of a pipeline in `BLOCKS`, in their order; arguments as above."""
    latent = resolution // 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    sizes = (latent, architecture.tokens, rank, weight_bytes)
    return BLOCKS[model.pipeline](architecture.transformer, *sizes)


def _joint_forward(stream: float, image: float, *, dual: bool) -> float:
    """The most that a block with two streams takes without gradients; arguments in bytes.

    In the feed-forward layer of the image: of both streams, the input and the output of attention;
    the normalised text; of the image, the sum with attention's output, the normalised sum, and four
    times as much before and after the activation. A second attention adds its input and output.
    """
    return 2 * stream + (stream - image) + (10 + 2 * dual) * image


def _flux(config: Mapping[str, Any], latent: int, text: int, rank: int, b: int) -> list[Block]:
    heads = config["num_attention_heads"]
    d, image = heads * config["attention_head_dim"], (latent // 2) ** 2
    tokens = image + text
    stream = tokens * d * b
    # Per head, attention's normaliser, and those of the norms of queries and keys.
    scalars = 3 * tokens * heads * FLOAT
    double = Block(
        given=stream,
        result=stream,
        # Input; its norm, for the adapters; queries and keys before their norms; queries, keys,
        # values and result of attention; the result in the layout of the output's adapter; the
        # input of the second norm; the feed-forward layer before its activation.
        saved=(1 + 1 + 2 + 4 + 1 + 1 + 4) * stream + 4 * tokens * rank * b + scalars,
        # Of the stream, and of the image's feed-forward layer before and after its activation.
        gradients=stream + 8 * image * d * b,
        forward=_joint_forward(stream, image * d * b, dual=False),
    )
    single = Block(
        given=stream,
        result=stream,
        # As above, without an adapter on the output and without a second norm.
        saved=(1 + 1 + 2 + 4 + 4) * stream + 3 * tokens * rank * b + scalars,
        # Of the stream, of attention's result with the feed-forward layer's, and of the latter
        # before its activation.
        gradients=(1 + 5 + 4) * stream,
        # When keys are rotated: input, joined input and its norm; the feed-forward layer; queries,
        # keys and values; in float32, both products of the rotation and one factor, and another.
        forward=(1 + 1 + 1 + 4 + 3) * stream + (3 * FLOAT + b) * tokens * d,
    )
    return [double] * config["num_layers"] + [single] * config["num_single_layers"]


def _flux2_klein(
    config: Mapping[str, Any], latent: int, text: int, rank: int, b: int
) -> list[Block]:
    heads = config["num_attention_heads"]
    d, image = heads * config["attention_head_dim"], (latent // 2) ** 2
    h = int(config["mlp_ratio"] * d)
    tokens, longer = image + text, max(image, text)
    stream = tokens * d * b
    # Per head, attention's normaliser, and those of the norms of queries and keys.
    scalars = 3 * tokens * heads * FLOAT
    double = Block(
        given=stream,
        result=stream,
        # Input; its modulated norm, for the adapters; queries and keys before their norms; queries,
        # keys, values and result of attention; the result in the layout of the output's adapter;
        # the input of the second norm; of the gated feed-forward layer the gate before and after
        # its activation and the gated half.
        saved=(1 + 1 + 2 + 4 + 1 + 1) * stream
        + 3 * tokens * h * b
        + 4 * tokens * rank * b
        + scalars,
        # Of the stream, and of the feed-forward layer's gate, gated half and their product.
        gradients=stream + 3 * longer * h * b,
        forward=max(
            # When keys are rotated: input, its norm, the text's queries, keys and values, those of
            # both streams; in float32, both products of the rotation and one factor, and another.
            5 * stream + 3 * text * d * b + (3 * FLOAT + b) * tokens * d,
            # In the feed-forward layer of one stream: input and result of attention; of each
            # stream, the gated result, the sum and its norm, and of the image the layer's output;
            # the layer before and after its activation, and the product.
            2 * stream + (4 * image + 3 * text) * d * b + 4 * text * h * b,
            2 * stream + (3 * image + text) * d * b + 4 * image * h * b,
        ),
    )
    # Input, its modulated norm, queries and keys, and result of attention; what one product gives,
    # queries, keys, values and the feed-forward layer; the activated gate; attention's result with
    # the feed-forward layer's, joined for the output.
    parts = tokens * b * ((1 + 1 + 2 + 1) * d + (3 * d + 2 * h) + h + (d + h))
    single = Block(
        given=stream,
        result=stream,
        saved=parts + 2 * tokens * rank * b + scalars,
        # Of the stream, of the first product, and of the feed-forward layer before its activation.
        gradients=stream + tokens * b * ((3 * d + 2 * h) + 2 * h),
        forward=parts,
    )
    return [double] * config["num_layers"] + [single] * config["num_single_layers"]


def _sd3(config: Mapping[str, Any], latent: int, text: int, rank: int, b: int) -> list[Block]:
    heads, layers = config["num_attention_heads"], config["num_layers"]
    d, image = heads * config["attention_head_dim"], (latent // config["patch_size"]) ** 2
    tokens = image + text

    def attention(count: int) -> float:
        """Queries, keys, values and result; queries and keys before their norms, twice.

        The second copy is the one in float32 of which the norm takes the variance.
        """
        twice = FLOAT if b < FLOAT else 0
        normed = 2 * (b + twice) if config["qk_norm"] else 0
        return count * (d * (4 * b + normed) + 3 * heads * FLOAT)

    def block(place: int) -> Block:
        dual = place in config["dual_attention_layers"]
        # The last block computes no output of the text.
        out = image if place == layers - 1 else tokens
        # Input; its norm, for the adapters; attention; its result in the layout of the output's
        # adapter; the input of the second norm; the feed-forward layer before its activation.
        saved = tokens * d * 2 * b + attention(tokens) + out * d * (1 + 1 + 4) * b
        saved += (3 * tokens + out) * rank * b
        if dual:  # over image tokens, without adapters
            saved += attention(image)
        stream = tokens * d * b
        return Block(
            given=stream,
            result=out * d * b,
            saved=saved,
            # Of the stream, and of the image's feed-forward layer before and after its activation.
            gradients=stream + 8 * image * d * b,
            forward=_joint_forward(stream, image * d * b, dual=dual),
        )

    return [block(place) for place in range(layers)]


BLOCKS: Mapping[str, Callable[[Mapping[str, Any], int, int, int, int], list[Block]]] = {
    "Flux2KleinPipeline": _flux2_klein,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
}


def decoder(vae: Mapping[str, Any], resolution: int, conv_bytes: int = HALF) -> Decoder:
    """The decoder, whose norms and activations are computed in float32.

    Args:
        vae: the autoencoder's configuration.
        resolution: of the images, in pixels.
        conv_bytes: of an input of a convolution.
    """
    first, *_ = channels = vae["block_out_channels"]
    before = channels[min(1, len(channels) - 1)]
    pixels = resolution**2
    # For each norm with activation and convolution: its input, the activation's, the convolution's.
    layer = 2 * FLOAT + conv_bytes
    # From the deepest block on, each twice as large as the one before: middle, up blocks, output.
    widths = [channels[-1], channels[-1], *reversed(channels)]
    sides = [resolution >> max(0, len(channels) - n) for n in range(1, len(channels) + 1)]
    sides = [sides[0], *sides, resolution]
    given = sum(conv_bytes * w * s**2 for w, s in zip(widths, sides, strict=True))
    return Decoder(
        # When the last block begins: its input, the same in float32 in two layouts, and its norm.
        forward=(HALF + 3 * FLOAT) * before * pixels,
        given=given,
        # Residual layers of two convolutions each; the first one has the channels of the input.
        last=layer * (before + first + vae["layers_per_block"] * 2 * first) * pixels,
        ends=layer * first * pixels,
        # Of the stream, and before and after an activation.
        gradients=(conv_bytes + 2 * FLOAT) * first * pixels,
    )


def autoencoder_weights(vae: Mapping[str, Any]) -> int:
    """The number of parameters of an AutoencoderKL, or of FLUX.2's, which has the same layers."""
    channels, layers = vae["block_out_channels"], vae["layers_per_block"]
    latent, deepest = vae["latent_channels"], channels[-1]

    def conv(given: int, out: int, side: int = 3) -> int:
        return side**2 * given * out + out

    def residual(given: int, out: int) -> int:
        skip = conv(given, out, 1) if given != out else 0
        return 2 * given + conv(given, out) + 2 * out + conv(out, out) + skip

    middle = 2 * residual(deepest, deepest)
    if vae.get("mid_block_add_attention", True):
        middle += 2 * deepest + 4 * conv(deepest, deepest, 1)

    def half(order: Sequence[int], depth: int, given: int, out: int) -> int:
        """Blocks of `depth` residual layers, and a change of resolution between two of them."""
        total = conv(given, order[0]) + middle + 2 * order[-1] + conv(order[-1], out)
        for before, after in pairwise((order[0], *order)):
            total += residual(before, after) + (depth - 1) * residual(after, after)
        return total + sum(conv(width, width) for width in order[:-1])

    encoder = half(channels, layers, 3, 2 * latent)
    if vae["use_quant_conv"]:
        encoder += conv(2 * latent, 2 * latent, 1)
    if vae["use_post_quant_conv"]:
        encoder += conv(latent, latent, 1)
    return encoder + half(channels[::-1], layers + 1, latent, 3)


def tower(width: int, layers: int, tokens: int, *, quick_gelu: bool = False) -> float:
    """Bytes per image that the gradient of a vision transformer in float32 needs.

    Per layer: the inputs of both norms; queries, keys, values and result of attention; the
    feed-forward layer before its activation, and for x sigmoid(1.702 x) also the sigmoid.
    """
    return (2 + 4 + (8 if quick_gelu else 4)) * layers * tokens * width * FLOAT


Parts = Mapping[str, float]  # bytes by name


def phases(architecture: Architecture, model: catalog.Model, setting: Setting) -> dict[str, Parts]:
    """The parts of the memory in each phase of an iteration.

    Args:
        architecture: the model's configuration.
        model: the catalogue's entry, of a pipeline in `BLOCKS`.
        setting: the training's.
    """
    config, batch, bytes_ = architecture.transformer, setting.micro_batch, setting.weight_bytes
    network = architectures.size(architecture, model, setting.resolution, setting.lora_rank)
    chain = blocks(architecture, model, setting.resolution, setting.lora_rank, bytes_)
    image = decoder(architecture.vae, setting.resolution)
    latent = setting.resolution // 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    values = architecture.vae["latent_channels"] * latent**2
    evaluated = architectures.evaluations(model)
    together = min(batch, setting.decoded or batch)
    inside = network.matrices if setting.quantize != "none" else 0
    quantized = quantization.BYTES.get(setting.quantize, 0) * inside
    restoring = quantization.RESTORING.get(setting.quantize, 0) * network.largest
    always = {
        "network": bytes_ * (network.weights - inside) + quantized,
        "autoencoder": FLOAT * autoencoder_weights(architecture.vae),
        "rewards": setting.rewards,
        "adapter": FLOAT * network.adapter,
        "average and AdamW's moments": 3 * FLOAT * network.adapter,
        # Embeddings, and the states before and after the trained steps.
        "prompts and states": setting.images
        * (
            architecture.tokens * config["joint_attention_dim"] * bytes_
            + 2 * setting.trained_steps * values * FLOAT
        ),
    }
    # Without checkpointing a block holds all that it saves; with it, that comes and goes.
    checkpointed = setting.gradient_checkpointing
    held = [block.given if checkpointed else block.saved for block in chain]
    extra = [block.gradients + (block.saved if checkpointed else 0) for block in chain]
    end = chain[-1].result  # the input of the last norm
    graph = evaluated * (sum(held) + end)  # of an evaluation of one image
    backward = evaluated * (end + max(map(sum, zip(accumulate(held), extra, strict=True))))
    kept = setting.kept_images * setting.trained_steps
    forward = evaluated * max(block.forward for block in chain)
    update = {
        **always,
        "gradients and their float64 sums": (FLOAT + 8) * network.adapter,
        "graphs of other evaluations": max(kept - batch, 0) * graph,
        "restored weight": restoring,
    }
    decoded = together * image.forward
    found: dict[str, Parts] = {
        "encoding": {**always, "text encoders": setting.text_encoders},
        "sampling": {
            **always,
            "kept graphs": kept * graph,
            "activations": batch * forward,
            "decoder": decoded if setting.score_ahead else 0.0,
            "restored weight": restoring,
        },
        "scoring": {**always, "kept graphs": kept * graph, "decoder": decoded},
        "update": {**update, "activations": batch * backward},
    }
    if setting.reward_activations is not None:
        # The rewards' activations are freed before the decoder's last block is computed again.
        beside = together * (image.last + image.gradients)
        own = batch * (image.ends + setting.reward_activations)
        differentiated = batch * image.given
        differentiated += beside + own if setting.retained else max(beside, own)
        found["reward gradients"] = {
            **update,
            "activations": batch * graph,
            "decoder and rewards": differentiated,
        }
    return found


def peak(found: Mapping[str, Parts]) -> float:
    """Bytes of the phase that takes most."""
    return max(sum(parts.values()) for parts in found.values())
