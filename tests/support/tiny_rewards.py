"""Tiny random checkpoints of the published reward models, with their files and layout."""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from support.hpsv2_package import SHIPPED
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from tafs.rewards import compat

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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
