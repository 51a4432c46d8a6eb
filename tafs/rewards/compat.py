"""image-reward with the present transformers: patches of the package, in this process only.

`import_imagereward()` replaces `import ImageReward`. Nothing is written into site-packages.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch

BERT_VOCABULARY_SIZE = 30522
BLIP_HEAD_WIDTH = 64  # width of an attention head of BLIP's image encoders


@functools.cache
def import_imagereward() -> ModuleType:
    """Import ImageReward, which works with transformers 5 and without fairscale.

    As published, except: pruning of attention heads and gradient checkpointing raise.
    """
    with restored_logging(), _imagereward_imports():
        package = importlib.import_module("ImageReward")
        from ImageReward.models.BLIP import blip, blip_pretrain, med

    # Removed from transformers' PreTrainedModel; added to image-reward's own classes only.
    base = med.BertPreTrainedModel
    base.all_tied_weights_keys = {}
    # image-reward never masks a head.
    base.get_head_mask = lambda _, head_mask, num_hidden_layers: [head_mask] * num_hidden_layers
    base.invert_attention_mask = _invert_attention_mask
    blip.init_tokenizer = blip_pretrain.init_tokenizer = _blip_tokenizer
    return package


def build_imagereward(
    med_config: Path,
    tokenizer: Path,
    *,
    width: int,
    depth: int,
    patch: int,
    device: torch.device | str,
) -> Any:
    """Build an untrained ImageReward with a tokenizer from a folder and an encoder of any size.

    image-reward itself downloads the tokenizer and supports two sizes of the image encoder.
    `width`, `depth` (layers) and `patch` (pixels) are those of the image encoder.

    Raises:
        RuntimeError: the tokenizer is incomplete.
    """
    package = import_imagereward()
    from ImageReward.models.BLIP import blip_pretrain, vit

    def image_encoder(_: str, image_size: int, *__: object) -> tuple[torch.nn.Module, int]:
        encoder = vit.VisionTransformer(
            img_size=image_size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=width // BLIP_HEAD_WIDTH,
        )
        return encoder, width

    with mock.patch.multiple(
        blip_pretrain,
        create_vit=image_encoder,
        init_tokenizer=functools.partial(_blip_tokenizer, str(tokenizer)),
    ):
        return package.ImageReward(med_config=str(med_config), device=device)


@contextmanager
def _imagereward_imports() -> Iterator[None]:
    """Provide the names that image-reward imports and that have moved or been removed."""
    from transformers import modeling_utils, pytorch_utils

    # fairscale is built from source against its own torch; only checkpointing would use it.
    parents = ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint")
    checkpointing: Any = ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = _unsupported
    moved: dict[str, Any] = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": _unsupported,
    }
    with (
        stub_modules([*map(ModuleType, parents), checkpointing]),
        mock.patch.multiple(modeling_utils, create=True, **moved),
    ):
        yield


@contextmanager
def stub_modules(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Make modules importable by their names inside the block only."""
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@contextmanager
def restored_logging() -> Iterator[None]:
    """Restore warning filters and log levels, which image-reward and hpsv2 change on import."""
    from transformers.utils import logging as transformers_logging

    verbosity, level = transformers_logging.get_verbosity(), logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logging.root.setLevel(level)


def _unsupported(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("head pruning and gradient checkpointing are not supported here")


def _invert_attention_mask(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """transformers 4's `invert_attention_mask`: 1 (attend) -> 0, 0 (ignore) -> the dtype's minimum.

    [B, keys] or [B, queries, keys] -> [B, 1, 1 or queries, keys].
    """
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
    return (1.0 - mask.to(model.dtype)) * torch.finfo(model.dtype).min


def _blip_tokenizer(source: str = "bert-base-uncased") -> Any:
    """BLIP's tokenizer; `additional_special_tokens_ids` was removed, so [ENC] is found by name."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(source)
    # Without network and cache, transformers silently returns a nearly empty tokenizer.
    if len(tokenizer) < BERT_VOCABULARY_SIZE:
        raise RuntimeError(
            f"{source} has {len(tokenizer)} of {BERT_VOCABULARY_SIZE} tokens: "
            "download it once with `hf download bert-base-uncased`"
        )
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer
