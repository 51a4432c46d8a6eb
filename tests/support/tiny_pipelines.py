"""Tiny random checkpoints in the layouts of the published ones, file by file.

Each function writes and returns a folder like the repository on huggingface.co: with the same
model_index.json, sub-folders, weight files and configuration keys, but small sizes and few layers.
Weights are bfloat16 and depend on the seed only.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)
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
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tafs.data.geneval import evaluation_rows

CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP_TOKENS = 49408
T5_TOKENS = 512
RANK = 4  # of the adapters; the published ones have 64

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # the weight files' stems


# -- FLUX.1 ----------------------------------------------------------------------------------------


def flux(folder: Path, seed: int = 0) -> Path:
    """black-forest-labs/FLUX.1-dev."""
    return _flux(folder, seed, guided=True, shift=3.0)


def flux_schnell(folder: Path, seed: int = 0) -> Path:
    """black-forest-labs/FLUX.1-schnell."""
    return _flux(folder, seed, guided=False, shift=1.0)


def _flux(folder: Path, seed: int, *, guided: bool, shift: float) -> Path:
    with _seeded(seed):
        _save(_clip(CLIPTextModel, 32), folder / "text_encoder", TRANSFORMERS)
        _save(_t5(32), folder / "text_encoder_2", TRANSFORMERS, shards=2)
        _save(_flux_transformer(guided), folder / "transformer", DIFFUSERS, shards=3)
        _save(_vae(0.3611, 0.1159), folder / "vae", DIFFUSERS)
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        num_train_timesteps=1000,
        shift=shift,
        use_dynamic_shifting=guided,
    ).save_pretrained(folder / "scheduler")
    _clip_tokenizer(folder / "tokenizer")
    _t5_tokenizer(folder / "tokenizer_2")
    return _index(
        folder,
        "FluxPipeline",
        "0.30.0.dev0",
        scheduler="FlowMatchEulerDiscreteScheduler",
        text_encoder="CLIPTextModel",
        text_encoder_2="T5EncoderModel",
        tokenizer="CLIPTokenizer",
        tokenizer_2="T5TokenizerFast",
        transformer="FluxTransformer2DModel",
        vae="AutoencoderKL",
    )


def _flux_transformer(guided: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),  # the published models' default sums to their head's 128
        guidance_embeds=guided,
        in_channels=64,
        joint_attention_dim=32,
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=2,
        patch_size=1,
        pooled_projection_dim=32,
    )


def turbo_alpha(folder: Path, seed: int = 1) -> Path:
    """alimama-creative/FLUX.1-Turbo-Alpha: an adapter for all linear layers, in bfloat16."""
    return _adapter(folder / "diffusion_pytorch_model.safetensors", seed, torch.bfloat16)


def hyper_flux(folder: Path, seed: int = 2) -> Path:
    """ByteDance/Hyper-SD's file for FLUX.1-dev: an adapter for all linear layers, in float32."""
    return _adapter(folder / "Hyper-FLUX.1-dev-8steps-lora.safetensors", seed, torch.float32)


def _adapter(file: Path, seed: int, dtype: torch.dtype) -> Path:
    """Write an adapter with the keys of diffusers.

    The sizes of the published files, 694 MB in bfloat16 and 1.39 GB in float32, are those of rank
    64 for all linear layers of FLUX.1-dev's transformer.
    """
    with _seeded(seed):
        tensors = {}
        for name, module in _flux_transformer().named_modules():
            if isinstance(module, nn.Linear):
                down = torch.randn(RANK, module.in_features) * module.in_features**-0.5
                tensors[f"transformer.{name}.lora_A.weight"] = down.to(dtype)
                up = torch.randn(module.out_features, RANK) * RANK**-0.5
                tensors[f"transformer.{name}.lora_B.weight"] = up.to(dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    return file.parent


# -- Stable Diffusion 3.5 --------------------------------------------------------------------------


def sd3(folder: Path, seed: int = 0) -> Path:
    """stabilityai/stable-diffusion-3.5-medium."""
    return _sd3(folder, seed, dual_attention_layers=(0, 1), num_layers=3, shards=1)


def sd3_large(folder: Path, seed: int = 0) -> Path:
    """stabilityai/stable-diffusion-3.5-large and -large-turbo."""
    return _sd3(folder, seed, dual_attention_layers=(), num_layers=2, shards=2)


def _sd3(
    folder: Path,
    seed: int,
    *,
    dual_attention_layers: tuple[int, ...],
    num_layers: int,
    shards: int,
) -> Path:
    with _seeded(seed):
        transformer = SD3Transformer2DModel(
            attention_head_dim=16,
            caption_projection_dim=32,
            dual_attention_layers=dual_attention_layers,
            in_channels=16,
            joint_attention_dim=80,
            num_attention_heads=2,
            num_layers=num_layers,
            out_channels=16,
            patch_size=2,
            pooled_projection_dim=64,
            pos_embed_max_size=64,
            qk_norm="rms_norm",
            sample_size=128,
        )
        _save(transformer, folder / "transformer", DIFFUSERS, shards=shards)
        encoders = {
            "text_encoder": (_clip(CLIPTextModelWithProjection, 32), 1),
            "text_encoder_2": (_clip(CLIPTextModelWithProjection, 32, act="gelu"), 1),
            "text_encoder_3": (_t5(80), 2),
        }
        for name, (encoder, parts) in encoders.items():
            _save(encoder, folder / name, TRANSFORMERS, shards=parts, variant="fp16")
            _save(encoder, folder / name, TRANSFORMERS, shards=parts)
        _save(_vae(1.5305, 0.0609), folder / "vae", DIFFUSERS)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    _clip_tokenizer(folder / "tokenizer")
    _clip_tokenizer(folder / "tokenizer_2", pad="!")
    _t5_tokenizer(folder / "tokenizer_3")
    return _index(
        folder,
        "StableDiffusion3Pipeline",
        "0.31.0.dev0",
        scheduler="FlowMatchEulerDiscreteScheduler",
        text_encoder="CLIPTextModelWithProjection",
        text_encoder_2="CLIPTextModelWithProjection",
        text_encoder_3="T5EncoderModel",
        tokenizer="CLIPTokenizer",
        tokenizer_2="CLIPTokenizer",
        tokenizer_3="T5TokenizerFast",
        transformer="SD3Transformer2DModel",
        vae="AutoencoderKL",
    )


# -- SANA ------------------------------------------------------------------------------------------


def sana(folder: Path, seed: int = 0) -> Path:
    """Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers."""
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    return _sana(folder, seed, "SanaPipeline", scheduler, guidance_embeds=False)


def sana_sprint(folder: Path, seed: int = 0) -> Path:
    """Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers."""
    return _sana(
        folder,
        seed,
        "SanaSprintPipeline",
        SCMScheduler(),
        guidance_embeds=True,
        timestep_scale=1000.0,
    )


def _sana(folder: Path, seed: int, kind: str, scheduler: Any, **settings: Any) -> Path:
    layers, multiscales = (1,) * 6, ((), (), (), (5,), (5,), (5,))
    channels = (8, 8, 8, 16, 32, 32)  # the last are at least the latents' 32
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with _seeded(seed):
        transformer = SanaTransformer2DModel(
            attention_head_dim=8,
            caption_channels=32,
            cross_attention_dim=32,
            cross_attention_head_dim=16,
            in_channels=32,
            num_attention_heads=4,
            num_cross_attention_heads=2,
            num_layers=2,
            out_channels=32,
            patch_size=1,
            qk_norm="rms_norm_across_heads",
            sample_size=32,
            **settings,
        )
        _save(transformer, folder / "transformer", DIFFUSERS)
        vae = AutoencoderDC(
            attention_head_dim=8,
            decoder_block_out_channels=channels,
            decoder_block_types=blocks,
            decoder_layers_per_block=layers,
            decoder_qkv_multiscales=multiscales,
            downsample_block_type="conv",
            encoder_block_out_channels=channels,
            encoder_block_types=blocks,
            encoder_layers_per_block=layers,
            encoder_qkv_multiscales=multiscales,
            latent_channels=32,
            scaling_factor=0.41407,
            upsample_block_type="interpolate",
        )
        _save(vae, folder / "vae", DIFFUSERS)
        _save(_gemma(), folder / "text_encoder", TRANSFORMERS, shards=2)
    scheduler.save_pretrained(folder / "scheduler")
    _gemma_tokenizer(folder / "tokenizer")
    return _index(
        folder,
        kind,
        "0.33.0.dev0",
        scheduler=type(scheduler).__name__,
        text_encoder="Gemma2Model",
        tokenizer="GemmaTokenizerFast",
        transformer="SanaTransformer2DModel",
        vae="AutoencoderDC",
    )


# -- HiDream-I1 ------------------------------------------------------------------------------------


def hidream(folder: Path, seed: int = 0) -> Path:
    """HiDream-ai/HiDream-I1-Full; its fourth text encoder is `llama`'s."""
    scheduler = UniPCMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    return _hidream(folder, seed, scheduler)


def hidream_fast(folder: Path, seed: int = 0) -> Path:
    """HiDream-ai/HiDream-I1-Fast; its fourth text encoder is `llama`'s."""
    return _hidream(folder, seed, FlowMatchLCMScheduler(shift=3.0))


def _hidream(folder: Path, seed: int, scheduler: Any) -> Path:
    with _seeded(seed):
        transformer = HiDreamImageTransformer2DModel(
            attention_head_dim=16,
            axes_dims_rope=(8, 4, 4),
            caption_channels=[32, 32],
            in_channels=16,
            llama_layers=[0, 1],
            max_resolution=(128, 128),
            num_activated_experts=2,
            num_attention_heads=1,
            num_layers=1,
            num_routed_experts=4,
            num_single_layers=1,
            out_channels=16,
            patch_size=2,
            text_emb_dim=64,
        )
        _save(transformer, folder / "transformer", DIFFUSERS, shards=7)
        for name, act in (("text_encoder", "quick_gelu"), ("text_encoder_2", "gelu")):
            encoder = _clip(CLIPTextModelWithProjection, 32, act=act, positions=248)
            _save(encoder, folder / name, TRANSFORMERS)
        _save(_t5(32), folder / "text_encoder_3", TRANSFORMERS, shards=2)
        _save(_vae(0.3611, 0.1159), folder / "vae", DIFFUSERS)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        _clip_tokenizer(folder / name, length=248)
    _t5_tokenizer(folder / "tokenizer_3")
    return _index(
        folder,
        "HiDreamImagePipeline",
        "0.32.1",
        scheduler=type(scheduler).__name__,
        text_encoder="CLIPTextModelWithProjection",
        text_encoder_2="CLIPTextModelWithProjection",
        text_encoder_3="T5EncoderModel",
        text_encoder_4="LlamaForCausalLM",
        tokenizer="CLIPTokenizer",
        tokenizer_2="CLIPTokenizer",
        tokenizer_3="T5Tokenizer",
        tokenizer_4="PreTrainedTokenizerFast",
        transformer="HiDreamImageTransformer2DModel",
        vae="AutoencoderKL",
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
        _save(LlamaForCausalLM(config), folder, TRANSFORMERS, shards=4)
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
    "StableDiffusion3Pipeline": sd3,
    "SanaPipeline": sana,
    "HiDreamImagePipeline": hidream,
}
# By the resource that models.yaml names.
RESOURCES: Mapping[str, Callable[[Path], Path]] = {
    "flux-dev": flux,
    "flux-schnell": flux_schnell,
    "flux-turbo-alpha": turbo_alpha,
    "hyper-flux": hyper_flux,
    "sd35-medium": sd3,
    "sd35-large": sd3_large,
    "sd35-large-turbo": sd3_large,
    "sana-1.5": sana,
    "sana-sprint": sana_sprint,
    "hidream-full": hidream,
    "hidream-fast": hidream_fast,
    "llama-3.1-8b-instruct": llama,
}


# -- parts -----------------------------------------------------------------------------------------


def _clip(kind: Any, width: int, act: str = "quick_gelu", positions: int = 77) -> nn.Module:
    return kind(
        CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=2,
            hidden_act=act,
            hidden_size=width,
            intermediate_size=2 * width,
            max_position_embeddings=positions,
            num_attention_heads=2,
            num_hidden_layers=2,
            pad_token_id=1,
            projection_dim=width,
            vocab_size=CLIP_TOKENS,
        )
    )


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            d_ff=2 * width,
            d_kv=16,
            d_model=width,
            feed_forward_proj="gated-gelu",
            num_heads=2,
            num_layers=2,
            vocab_size=T5_TOKENS,
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


def _vae(scaling: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        force_upcast=True,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=scaling,
        shift_factor=shift,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_post_quant_conv=False,
        use_quant_conv=False,
    )


# -- tokenizers ------------------------------------------------------------------------------------


def _clip_tokenizer(folder: Path, pad: str = "<|endoftext|>", length: int = 77) -> None:
    """Write CLIP's tokenizer, from the vocabulary in open_clip."""
    vocabulary, merges = _clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
    _write(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write(folder / "special_tokens_map.json", special)
    _write(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": length,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return CLIP's numbers of tokens, and its merges with the most frequent first."""
    [package] = importlib.util.find_spec("open_clip").submodule_search_locations
    with gzip.open(Path(package) / CLIP_VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # Printable bytes represent themselves; the others are characters from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = lines[1 : CLIP_TOKENS - 2 - len(pieces) + 1]
    pieces += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _t5_tokenizer(folder: Path) -> None:
    """Write a SentencePiece tokenizer like T5's, trained on GenEval's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece("unigram", 400))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(folder / "special_tokens_map.json", special)
    settings = {"extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    _write(folder / "tokenizer_config.json", {**special, **settings})
    tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _gemma_tokenizer(folder: Path) -> None:
    """Write a byte-pair tokenizer like Gemma's, trained on GenEval's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = _sentencepiece("bpe", 600)
    (folder / "tokenizer.model").write_bytes(trained)
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    special = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
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
    _write(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": 8192, "tokenizer_class": "GemmaTokenizer"}
    _write(folder / "tokenizer_config.json", {**special, **settings})


@functools.cache
def _sentencepiece(kind: str, size: int) -> bytes:
    """Train a SentencePiece model of at most `size` pieces: "unigram" (T5) or "bpe" (Gemma)."""
    settings: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if kind == "bpe":
        names = {"bos_piece": "<bos>", "eos_piece": "<eos>", "byte_fallback": True}
        settings = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **names}
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


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the `with` block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(module: Any, folder: Path, stem: str, shards: int = 1, variant: str = "") -> None:
    """Write a module's configuration and weights, in `shards` files with an index if several."""
    module.eval().to(torch.float16 if variant == "fp16" else torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
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


def _index(folder: Path, kind: str, version: str, **components: str) -> Path:
    """Write model_index.json: the pipeline and each component's class, and diffusers' version."""
    libraries = {
        name: ["transformers" if name.startswith(("text", "token")) else "diffusers", component]
        for name, component in components.items()
    }
    _write(
        folder / "model_index.json",
        {"_class_name": kind, "_diffusers_version": version, **libraries},
    )
    return folder


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
