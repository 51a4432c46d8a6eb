"""Tokenizers and text encoders of the embedded models, in the layout of Stable Diffusion 3's.

The vocabulary consists of the captions' words and is constructed instead of learnt: the CLIP
tokenizer's merges join the letters of each word from left to right; the T5 pieces are whole words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
from transformers import (
    CLIPPreTrainedModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tafs.shapes import captions

MAX_TOKENS = captions.MAX_WORDS + 2  # CLIP marks the start and the end
CLIP_WIDTH = 64
T5_WIDTH = 128


def words() -> list[str]:
    """All words of the captions, sorted."""
    return sorted(captions.words())


def clip_tokenizer(
    vocabulary: Sequence[str] | None = None, max_tokens: int = MAX_TOKENS
) -> CLIPTokenizer:
    """A byte-pair tokenizer in which each word of the vocabulary is one token.

    Args:
        vocabulary: by default `words()`; where it has single characters only, each is one token.
        max_tokens: of a caption, with its start and end.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    pieces: dict[str, None] = {}
    ranks: dict[tuple[str, str], int] = {}
    for word in words() if vocabulary is None else vocabulary:
        letters = [*word[:-1], word[-1] + "</w>"]
        pieces.update(dict.fromkeys([*word, *letters]))
        # Merges of earlier words apply first; the remaining parts are joined by new merges of lower
        # priority, which do not change earlier words.
        parts = _merge(letters, ranks)
        while len(parts) > 1:
            ranks[(parts[0], parts[1])] = len(ranks)
            parts = _merge(letters, ranks)
        pieces.update(dict.fromkeys(a + b for a, b in ranks))
    vocab = {piece: index for index, piece in enumerate([*pieces, start, end])}
    # transformers' annotation is wrong: it reads pairs.
    merges: Any = list(ranks)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def _merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: repeatedly join the pair with the lowest rank."""
    parts = list(parts)
    while True:
        pairs = list(zip(parts, parts[1:], strict=False))
        known = [pair for pair in pairs if pair in ranks]
        if not known:
            return parts
        best = min(known, key=lambda pair: ranks[pair])
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]


def t5_tokenizer(pieces: Sequence[str] | None = None, max_tokens: int = MAX_TOKENS) -> T5Tokenizer:
    """A Unigram tokenizer.

    Args:
        pieces: by default `words()`; "▁" stands for the space before a word.
        max_tokens: of a caption, with its end.
    """
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = ["▁" + word for word in words()] if pieces is None else pieces
    vocab += [(piece, -1.0) for piece in known]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_tokens)


def clip_text_config(tokenizer: CLIPTokenizer, width: int = CLIP_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_text_encoder(tokenizer: CLIPTokenizer, *, projected: bool = True) -> CLIPPreTrainedModel:
    """A CLIP text encoder, with a projection as in Stable Diffusion 3 or without as in FLUX.1."""
    config = clip_text_config(tokenizer)
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
