"""Tiny random checkpoints of the published reward models, with their files and layout."""

from __future__ import annotations

import gzip
import json
import math
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from support.hpsv2_package import SHIPPED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from tafs.rewards import compat
from tafs.rewards import hpsv3 as hpsv3_module

IMAGE = 224  # pixels, as in the published models
PATCH = 56

# The published preprocessor_config.json, in its old format.
PREPROCESSOR = {
    **{"do_center_crop": True, "do_normalize": True, "do_resize": True},
    "feature_extractor_type": "CLIPFeatureExtractor",
    "crop_size": IMAGE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": IMAGE,
}
HPSV2 = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": IMAGE, "layers": 2, "width": 80, "head_width": 80}
    | {"patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
# The published med_config.json; its widths are required by image-reward's MLP.
MED_CONFIG = {
    **{"architectures": ["BertModel"], "model_type": "bert", "add_type_embeddings": False},
    **{"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu"},
    **{"hidden_size": 768, "intermediate_size": 64, "encoder_width": 768, "vocab_size": 256},
    **{"num_attention_heads": 12, "num_hidden_layers": 2, "add_cross_attention": True},
    **{"initializer_range": 0.02, "layer_norm_eps": 1e-12, "max_position_embeddings": 512},
    "pad_token_id": 0,
}

QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_IDS, QWEN_PADS = ("vision_start", "vision_end"), ("image", "video")
QWEN2_NORMS = ("input_layernorm", "post_attention_layernorm")
# The published config.json, in its old format, with other sizes.
QWEN2_VL: dict[str, Any] = {
    **{"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"},
    **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
    **{"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_sliding_window": False},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    "vision_config": {
        **{"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3},
        **{"hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2},
        **{"spatial_patch_size": 14, "temporal_patch_size": 2},
    },
}


def clip_processor(folder: Path) -> None:
    """Image processor and tokenizer, as in laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    known = open_clip.SimpleTokenizer().encoder
    lines = gzip.decompress(SHIPPED.read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : len(known) - 2 * 256 - 2 + 1]]
    vocabulary = {word: row for row, word in enumerate([*list(known)[:-2], start, end])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")


def clip_model(folder: Path, activation: str, seed: int) -> None:
    """A CLIPModel: config.json, model.safetensors."""
    size = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    # These ids of the published text configurations differ from the tokenizer's.
    text = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=size | text,
        vision_config=size | {"image_size": IMAGE, "patch_size": PATCH},
        projection_dim=32,
        logit_scale_init_value=3.2,
    )
    with _seeded(seed):
        CLIPModel(config).save_pretrained(folder)


def clip(folder: Path) -> None:
    """openai/clip-vit-large-patch14."""
    clip_model(folder, "quick_gelu", seed=0)
    clip_processor(folder)


def pickscore(folder: Path) -> None:
    """yuvalkirstain/PickScore_v1, which has no processor."""
    clip_model(folder, "gelu", seed=1)


def hpsv2(file: Path) -> None:
    """HPS_v2.1_compressed.pt of xswu/HPSv2."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _seeded(2):
        state = open_clip.CLIP(**HPSV2).state_dict()
    torch.save({"state_dict": state}, file)


def bert_tokenizer(folder: Path) -> None:
    """bert-base-uncased's tokenizer with as many tokens; the first 200 spell any text."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += [f"##{letter}" for letter in letters if letter.isalnum()]
    words += [f"[unused{n}]" for n in range(compat.BERT_VOCABULARY_SIZE - len(words))]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def imagereward(folder: Path, tokenizer: Path) -> None:
    """ImageReward.pt and med_config.json of THUDM/ImageReward."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "med_config.json"
    config.write_text(json.dumps(MED_CONFIG), encoding="utf-8")
    with _seeded(3):
        model = compat.build_imagereward(
            config, tokenizer, width=64, depth=2, patch=PATCH, device="cpu"
        )
        # The initial head is almost constant.
        for module in model.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
    torch.save(model.state_dict(), folder / "ImageReward.pt")


def qwen_tokenizer(folder: Path, text: str = "") -> int:
    """Qwen's tokenizer.json with its special tokens and the merges of a text; return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000 if text else 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(QWEN_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def qwen2_vl(folder: Path) -> int:
    """config.json and tokenizer.json of Qwen/Qwen2-VL-7B-Instruct; return the tokenizer's size."""
    size = qwen_tokenizer(folder, hpsv3_module.QUESTION)
    first = size - len(QWEN_TOKENS)
    ids = {f"{name}_token_id": first + QWEN_TOKENS.index(f"<|{name}|>") for name in QWEN_IDS}
    ids |= {f"{name}_token_id": first + QWEN_TOKENS.index(f"<|{name}_pad|>") for name in QWEN_PADS}
    config = {**QWEN2_VL, **ids, "vocab_size": size + 90}  # Qwen2-VL has unused rows
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size


def hpsv3(file: Path, size: int) -> None:
    """HPSv3.safetensors of MizzenAI/HPSv3 for a tokenizer of this size, in the package's names.

    The weights are a formula, so that the package's scores of them can be repeated anywhere.
    """
    width, deep = QWEN2_VL["hidden_size"], QWEN2_VL["intermediate_size"]
    heads = QWEN2_VL["num_key_value_heads"] * width // QWEN2_VL["num_attention_heads"]
    seen, inner = QWEN2_VL["vision_config"]["embed_dim"], 2 * QWEN2_VL["vision_config"]["embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (seen, 3, 2, 14, 14),
        **{f"visual.merger.ln_q.{part}": (seen,) for part in ("weight", "bias")},
        **_linear("visual.merger.mlp.0", 4 * seen, 4 * seen),
        **_linear("visual.merger.mlp.2", width, 4 * seen),
        "model.embed_tokens.weight": (size + 1, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (size + 1, width),
        **_linear("rm_head.0", 1024, width),
        **_linear("rm_head.3", 16, 1024),
        **_linear("rm_head.5", 2, 16),
    }
    for layer in range(2):
        block = f"visual.blocks.{layer}."
        norms = [f"{block}norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]
        shapes |= {name: (seen,) for name in norms}
        shapes |= _linear(f"{block}attn.qkv", 3 * seen, seen) | _linear(
            f"{block}attn.proj", seen, seen
        )
        shapes |= _linear(f"{block}mlp.fc1", inner, seen) | _linear(f"{block}mlp.fc2", seen, inner)
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}.weight": (width,) for name in QWEN2_NORMS}
        shapes |= _linear(f"{block}self_attn.q_proj", width, width)
        shapes |= _linear(f"{block}self_attn.k_proj", heads, width)
        shapes |= _linear(f"{block}self_attn.v_proj", heads, width)
        shapes |= {f"{block}self_attn.o_proj.weight": (width, width)}
        shapes |= {f"{block}mlp.{name}_proj.weight": (deep, width) for name in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (width, deep)}
    state = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = math.prod(shape)
        values = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + 7 * number)
        spread = 1.5 / math.sqrt(count / shape[0]) if len(shape) > 1 else 0.1
        norm = len(shape) == 1 and "norm" in name + "norm" * ("ln_q" in name) and "bias" not in name
        state[name] = (values.view(shape) * spread + norm).float()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
