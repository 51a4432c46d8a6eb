"""Every patch of a third-party package, so that all of them run in one environment.

`patch_torchvision()` comes before the first import of torchvision, which open_clip, timm and
transformers' image models import: tafs/__init__.py sees to it. `import_hpsv2()` and
`import_imagereward()` replace `import hpsv2` and `import ImageReward`. Nothing is written into
site-packages: the patches live in this process only.
"""

from __future__ import annotations

import functools
import gzip
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

import torch

BPE_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


BERT_VOCABULARY_SIZE = 30522


BLIP_HEAD_WIDTH = 64  # of the image encoder's attention, in both of BLIP's sizes


@functools.cache
def import_hpsv2() -> ModuleType:
    """`import hpsv2`, with its tokenizer's vocabulary read from open_clip_torch.

    hpsv2's wheel lacks the vocabulary that its bundled open_clip opens on import, at a path that
    it computes from its own file, so only the opening can be redirected. open_clip_torch ships the
    same bytes. And it imports a name that it does not use from turtle, which needs tkinter, which
    many systems leave out of Python.
    """
    import open_clip

    shipped = Path(open_clip.__file__).with_name(BPE_VOCABULARY)
    gzip_open = gzip.open

    def redirected(filename: Any, *args: Any, **kwargs: Any) -> Any:
        path = str(filename)
        missing = path.endswith(BPE_VOCABULARY) and not Path(path).exists()
        return gzip_open(shipped if missing else filename, *args, **kwargs)

    turtle: Any = ModuleType("turtle")
    turtle.forward = _unsupported
    with _quietly(), _offered([turtle]), mock.patch.object(gzip, "open", redirected):
        # `import hpsv2` alone would put off what opens the vocabulary until gzip is itself again.
        importlib.import_module("hpsv2.img_score")
    return sys.modules["hpsv2"]


@functools.cache
def import_imagereward() -> ModuleType:
    """`import ImageReward`, made to work with transformers 5 and without fairscale.

    As published, except: pruning of attention heads and gradient checkpointing raise.
    """
    with _quietly(), _imagereward_imports():
        package = importlib.import_module("ImageReward")
        from ImageReward.models.BLIP import blip, blip_pretrain, med

    # What transformers' PreTrainedModel no longer offers; only image-reward's own classes get it.
    base = med.BertPreTrainedModel
    base.all_tied_weights_keys = {}
    base.get_head_mask = _no_head_mask
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
    """An untrained ImageReward: BLIP's tokenizer from a folder, an image encoder of a given size.

    image-reward downloads the tokenizer by its name, and has its two sizes of the encoder only.

    Raises:
        RuntimeError: the tokenizer is not complete.
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
    """While image-reward is imported, offer the names that have moved or vanished."""
    from transformers import modeling_utils, pytorch_utils

    # fairscale's source build would need its own torch, and only gradient checkpointing uses it.
    parents = ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint")
    checkpointing: Any = ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = _unsupported
    moved: dict[str, Any] = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": _unsupported,
    }
    with (
        _offered([*map(ModuleType, parents), checkpointing]),
        mock.patch.multiple(modeling_utils, create=True, **moved),
    ):
        yield


@contextmanager
def _offered(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Whatever is imported in the block finds these under their names, and nothing afterwards."""
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
def _quietly() -> Iterator[None]:
    """Undo what the packages do on import: silence all warnings, set levels of others' loggers."""
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
    raise NotImplementedError("scoring needs no head pruning, no checkpointing and no turtle")


def _no_head_mask(_: object, head_mask: None, num_hidden_layers: int) -> list[None]:
    """transformers 4's `get_head_mask`; image-reward never masks a head."""
    return [head_mask] * num_hidden_layers


def _invert_attention_mask(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """transformers 4's `invert_attention_mask`: 1 (attend) -> 0, 0 (ignore) -> the lowest number.

    mask: [B, keys] or [B, queries, keys] -> [B, 1, 1 or queries, keys]
    """
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
    return (1.0 - mask.to(model.dtype)) * torch.finfo(model.dtype).min


def _blip_tokenizer(source: str = "bert-base-uncased") -> Any:
    """BLIP's tokenizer: `additional_special_tokens_ids` is gone, so [ENC] is looked up by name.

    source: of bert-base-uncased's tokenizer, its name or a folder.
    """
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(source)
    # Without network and cache transformers returns a nearly empty tokenizer and says nothing.
    if len(tokenizer) < BERT_VOCABULARY_SIZE:
        raise RuntimeError(
            f"{source} has {len(tokenizer)} of {BERT_VOCABULARY_SIZE} tokens: "
            "download it once with `hf download bert-base-uncased`"
        )
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer
