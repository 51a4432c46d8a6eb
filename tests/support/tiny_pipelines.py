"""Tiny random checkpoints in the layouts of the published ones, file by file.

Each function writes and returns a folder like the repository on huggingface.co: with the same
model_index.json, sub-folders, weight files and configuration keys, but small sizes and few layers.
Weights are bfloat16 and depend on the seed only.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tafs.data.geneval import evaluation_rows
from tafs.models.architectures import FLUX2_LATENTS, FLUX_LATENTS, SD3_LATENTS, vae

RANK = 4  # of the adapters; the published ones have 64


def flux(folder: Path, seed: int = 0, *, guided: bool = True, shift: float = 3.0) -> Path:
    """black-forest-labs/FLUX.1-dev, or -schnell."""
    return _repository(
        folder,
        seed,
        ("FluxPipeline", "0.30.0.dev0"),
        modules={
            "text_encoder": partial(_clip, CLIPTextModel),
            "text_encoder_2": _t5,
            "transformer": partial(_flux_transformer, guided),
            "vae": partial(_vae, FLUX_LATENTS),
        },
        shards={"text_encoder_2": 2, "transformer": 3},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=guided),
        tokenizers={
            "tokenizer": ("CLIPTokenizer", _clip_tokenizer),
            "tokenizer_2": ("T5TokenizerFast", _t5_tokenizer),
        },
    )


def _flux_transformer(guided: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guided,
        joint_attention_dim=32,
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=2,
        pooled_projection_dim=32,
    )


def _adapter(folder: Path, name: str, seed: int, dtype: torch.dtype) -> Path:
    """Write an adapter for all linear layers of FLUX.1-dev, with the keys of diffusers.

    The sizes of the published files, 694 MB in bfloat16 and 1.39 GB in float32, are those of rank
    64 for all linear layers of FLUX.1-dev's transformer.
    """
    with _seeded(seed):
        tensors = {}
        for layer, module in _flux_transformer().named_modules():
            if isinstance(module, nn.Linear):
                down = torch.randn(RANK, module.in_features) * module.in_features**-0.5
                tensors[f"transformer.{layer}.lora_A.weight"] = down.to(dtype)
                up = torch.randn(module.out_features, RANK) * RANK**-0.5
                tensors[f"transformer.{layer}.lora_B.weight"] = up.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def flux2_klein(folder: Path, seed: int = 0) -> Path:
    """black-forest-labs/FLUX.2-klein-base-4B."""
    transformer = partial(
        Flux2Transformer2DModel,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        joint_attention_dim=3 * 32,  # three layers of the text encoder
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=2,
    )
    return _repository(
        folder,
        seed,
        ("Flux2KleinPipeline", "0.37.0.dev0"),
        modules={
            "text_encoder": _qwen3,
            "transformer": transformer,
            "vae": _normalising_vae,
        },
        shards={"text_encoder": 2},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizers={"tokenizer": ("Qwen2TokenizerFast", _qwen_tokenizer)},
    )


def sd3(folder: Path, seed: int = 0, *, large: bool = False) -> Path:
    """stabilityai/stable-diffusion-3.5-medium, or -large and -large-turbo."""
    transformer = partial(
        SD3Transformer2DModel,
        attention_head_dim=16,
        caption_projection_dim=32,
        dual_attention_layers=() if large else (0, 1),
        joint_attention_dim=80,
        num_attention_heads=2,
        num_layers=2 if large else 3,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    return _repository(
        folder,
        seed,
        ("StableDiffusion3Pipeline", "0.31.0.dev0"),
        modules={
            "transformer": transformer,
            "text_encoder": partial(_clip, CLIPTextModelWithProjection),
            "text_encoder_2": partial(_clip, CLIPTextModelWithProjection, act="gelu"),
            "text_encoder_3": partial(_t5, 80),
            "vae": partial(_vae, SD3_LATENTS),
        },
        shards={"text_encoder_3": 2, "transformer": 2 if large else 1},
        variants=("fp16", ""),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizers={
            "tokenizer": ("CLIPTokenizer", _clip_tokenizer),
            "tokenizer_2": ("CLIPTokenizer", partial(_clip_tokenizer, pad="!")),
            "tokenizer_3": ("T5TokenizerFast", _t5_tokenizer),
        },
    )


def sana(folder: Path, seed: int = 0, *, sprint: bool = False) -> Path:
    """Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers, or Sana_Sprint_1.6B_1024px_diffusers."""
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    transformer = partial(
        SanaTransformer2DModel,
        attention_head_dim=8,
        caption_channels=32,
        cross_attention_dim=32,
        cross_attention_head_dim=16,
        guidance_embeds=sprint,
        num_attention_heads=4,
        num_cross_attention_heads=2,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0 if sprint else 1.0,
    )
    return _repository(
        folder,
        seed,
        ("SanaSprintPipeline" if sprint else "SanaPipeline", "0.33.0.dev0"),
        modules={"transformer": transformer, "vae": _deep_compression, "text_encoder": _gemma},
        shards={"text_encoder": 2},
        scheduler=SCMScheduler() if sprint else DPMSolverMultistepScheduler(flow_shift=3.0, **flow),
        tokenizers={"tokenizer": ("GemmaTokenizerFast", _gemma_tokenizer)},
    )


def hidream(folder: Path, seed: int = 0, *, fast: bool = False) -> Path:
    """HiDream-ai/HiDream-I1-Full, or -Fast; their fourth text encoder is `llama`'s."""
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    transformer = partial(
        HiDreamImageTransformer2DModel,
        attention_head_dim=16,
        axes_dims_rope=(8, 4, 4),
        caption_channels=[32, 32],
        in_channels=16,
        llama_layers=[0, 1],
        num_attention_heads=1,
        num_layers=1,
        num_single_layers=1,
        out_channels=16,
        patch_size=2,
        text_emb_dim=64,
    )
    clip = partial(_clip, CLIPTextModelWithProjection, positions=248)
    clip_tokenizer = ("CLIPTokenizer", partial(_clip_tokenizer, length=248))
    return _repository(
        folder,
        seed,
        ("HiDreamImagePipeline", "0.32.1"),
        modules={
            "transformer": transformer,
            "text_encoder": clip,
            "text_encoder_2": partial(clip, act="gelu"),
            "text_encoder_3": _t5,
            "vae": partial(_vae, FLUX_LATENTS),
        },
        shards={"text_encoder_3": 2, "transformer": 7},
        scheduler=FlowMatchLCMScheduler(shift=3.0)
        if fast
        else UniPCMultistepScheduler(flow_shift=3.0, **flow),
        tokenizers={
            "tokenizer": clip_tokenizer,
            "tokenizer_2": clip_tokenizer,
            "tokenizer_3": ("T5Tokenizer", _t5_tokenizer),
        },
        absent={"text_encoder_4": "LlamaForCausalLM", "tokenizer_4": "PreTrainedTokenizerFast"},
    )


def llama(folder: Path, seed: int = 0) -> Path:
    """meta-llama/Llama-3.1-8B-Instruct."""
    config = LlamaConfig(
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=320,
    )
    with _seeded(seed):
        _save(LlamaForCausalLM(config), folder, shards=4)
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    pieces = [begin, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, model_max_length=131072
    ).save_pretrained(folder)
    _write(folder / "special_tokens_map.json", {"bos_token": begin, "eos_token": end})
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    return folder


# By the pipeline class that a backbone trains.
PIPELINES: Mapping[str, Callable[[Path], Path]] = {
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2_klein,
    "StableDiffusion3Pipeline": sd3,
    "SanaPipeline": sana,
    "HiDreamImagePipeline": hidream,
}
# By the resource that models.yaml names.
RESOURCES: Mapping[str, Callable[[Path], Path]] = {
    "flux-dev": flux,
    "flux-schnell": partial(flux, guided=False, shift=1.0),
    "flux-turbo-alpha": partial(
        _adapter, name="diffusion_pytorch_model.safetensors", seed=1, dtype=torch.bfloat16
    ),
    "hyper-flux": partial(
        _adapter, name="Hyper-FLUX.1-dev-8steps-lora.safetensors", seed=2, dtype=torch.float32
    ),
    "flux2-klein-base-4b": flux2_klein,
    "sd35-medium": sd3,
    "sd35-large": partial(sd3, large=True),
    "sd35-large-turbo": partial(sd3, large=True),
    "sana-1.5": sana,
    "sana-sprint": partial(sana, sprint=True),
    "hidream-full": hidream,
    "hidream-fast": partial(hidream, fast=True),
    "llama-3.1-8b-instruct": llama,
}


def _repository(
    folder: Path,
    seed: int,
    kind: tuple[str, str],
    *,
    modules: Mapping[str, Callable[[], Any]],
    shards: Mapping[str, int],
    scheduler: Any,
    tokenizers: Mapping[str, tuple[str, Callable[[Path], None]]],
    variants: tuple[str, ...] = ("",),
    absent: Mapping[str, str] | None = None,
) -> Path:
    """Write a pipeline folder.

    Args:
        folder: where it is written.
        seed: of all weights, which are drawn in the order of `modules`.
        kind: the pipeline's class, and diffusers' version in model_index.json.
        modules: networks by name.
        shards: the number of a module's weight files; 1 by default.
        scheduler: the scheduler.
        tokenizers: their classes in model_index.json, and what writes them.
        variants: of the text encoders' weights.
        absent: the classes of components that are named in model_index.json only.
    """
    classes = {"scheduler": type(scheduler).__name__, **(absent or {})}
    with _seeded(seed):
        for name, make in modules.items():
            module = make()
            classes[name] = type(module).__name__
            for variant in variants if name.startswith("text") else ("",):
                _save(module, folder / name, shards.get(name, 1), variant)
    scheduler.save_pretrained(folder / "scheduler")
    for name, (classes[name], write) in tokenizers.items():
        write(folder / name)
    libraries = {
        name: ["transformers" if name.startswith(("text", "token")) else "diffusers", classes[name]]
        for name in sorted(classes)
    }
    names = {"_class_name": kind[0], "_diffusers_version": kind[1]}
    _write(folder / "model_index.json", names | libraries)
    return folder


def _clip(kind: Any, act: str = "quick_gelu", positions: int = 77) -> nn.Module:
    return kind(
        CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=2,
            hidden_act=act,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=positions,
            num_attention_heads=2,
            num_hidden_layers=2,
            projection_dim=32,
        )
    )


def _t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            d_ff=2 * width,
            d_kv=16,
            d_model=width,
            feed_forward_proj="gated-gelu",
            num_heads=2,
            num_layers=2,
            vocab_size=512,
        )
    )


def _gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=1,
            query_pre_attn_scalar=16,
            vocab_size=1024,
        )
    )


def _qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=28,  # the pipeline reads layers 9, 18 and 27
            num_key_value_heads=1,
            tie_word_embeddings=True,
            vocab_size=320,
        )
    )


def _normalising_vae() -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder, whose batch-norm statistics scale the latents."""
    made = AutoencoderKLFlux2(**vae((4, 8, 8, 8), 1, 4, FLUX2_LATENTS), sample_size=1024)
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def _vae(latents: Mapping[str, float]) -> AutoencoderKL:
    return AutoencoderKL(**vae((4, 8, 8, 8), 1, 4, latents), sample_size=1024)


def _deep_compression() -> AutoencoderDC:
    shared = {
        "block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "block_out_channels": (8, 8, 8, 16, 32, 32),  # the last are at least the latents' 32
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    }
    return AutoencoderDC(
        attention_head_dim=8,
        downsample_block_type="conv",
        scaling_factor=0.41407,
        upsample_block_type="interpolate",
        **{
            f"{part}_{key}": value
            for part in ("encoder", "decoder")
            for key, value in shared.items()
        },
    )


def _clip_tokenizer(folder: Path, pad: str = "<|endoftext|>", length: int = 77) -> None:
    """Write CLIP's tokenizer, from open_clip's."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    own = _open_clip()
    pieces = [*list(own.encoder)[:-2], start, end]
    _write(folder / "vocab.json", {piece: number for number, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *map(" ".join, own.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
    lower = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    _settings(folder, special, **lower, model_max_length=length, tokenizer_class="CLIPTokenizer")


_open_clip = cache(SimpleTokenizer)


def _settings(folder: Path, special: Mapping[str, str], **settings: Any) -> None:
    _write(folder / "special_tokens_map.json", special)
    _write(folder / "tokenizer_config.json", {**special, **settings})


def _t5_tokenizer(folder: Path) -> None:
    """Write a SentencePiece tokenizer like T5's, trained on GenEval's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece("unigram", 400))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _settings(folder, special, extra_ids=100, model_max_length=512, tokenizer_class="T5Tokenizer")
    tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _gemma_tokenizer(folder: Path) -> None:
    """Write a byte-pair tokenizer like Gemma's, trained on GenEval's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = _sentencepiece("bpe", 600)
    (folder / "tokenizer.model").write_bytes(trained)
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    # Each piece precedes the pieces that contain it, so this is the order of the trained merges.
    merges = [
        (piece[:i], piece[i:])
        for piece in vocabulary
        if not piece.startswith("<")
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, **special)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    _settings(folder, special, model_max_length=8192, tokenizer_class="GemmaTokenizer")


CHAT = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def _qwen_tokenizer(folder: Path) -> None:
    """Write a tokenizer like Qwen3's: single bytes, and the words of its chat template."""
    own = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {p: i for i, p in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    added = {piece: len(vocabulary) + i for i, piece in enumerate(own)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens(own, special_tokens=True)
    _write(folder / "vocab.json", vocabulary)
    _write(folder / "added_tokens.json", added)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _settings(folder, special, model_max_length=131072, tokenizer_class="Qwen2Tokenizer")


@cache
def _sentencepiece(kind: str, size: int) -> bytes:
    """Train a SentencePiece model of at most `size` pieces: "unigram" (T5) or "bpe" (Gemma)."""
    settings: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if kind == "bpe":
        settings |= {"bos_id": 2, "unk_id": 3, "byte_fallback": True}
        settings |= {"bos_piece": "<bos>", "eos_piece": "<eos>"}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row["prompt"] for row in evaluation_rows()]),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the `with` block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(module: Any, folder: Path, shards: int = 1, variant: str = "") -> None:
    """Write a module's configuration and weights, in `shards` files with an index if several."""
    module.eval().to(torch.float16 if variant == "fp16" else torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if isinstance(module, PreTrainedModel) else "diffusion_pytorch_model"
    dotted = f".{variant}" if variant else ""
    # In another folder first, because transformers deletes the shards of other variants.
    with TemporaryDirectory() as elsewhere:
        module.save_pretrained(elsewhere)
        shutil.copy(Path(elsewhere, "config.json"), folder)
        file = Path(elsewhere, f"{stem}.safetensors")
        if shards == 1:
            shutil.copy(file, folder / f"{stem}{dotted}.safetensors")
            return
        tensors = load_file(file)
    names = [f"{stem}{dotted}-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    places = {key: names[i * shards // len(tensors)] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key, place in places.items() if place == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    _write(folder / f"{stem}.safetensors.index{dotted}.json", index)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
