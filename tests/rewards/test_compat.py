"""The patches of image-reward and hpsv2 are necessary, work, and do not affect other code."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hpsv2_package import BPE_VOCABULARY, import_hpsv2
from transformers.utils import logging as transformers_logging

from tafs.rewards import compat

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red square left of a blue circle", "Zwölf Boxkämpfer, it's 3 o'clock & more"]


@pytest.fixture(scope="module")
def hpsv2() -> Any:
    return import_hpsv2()


@pytest.fixture(scope="module")
def imagereward() -> Any:
    return compat.import_imagereward()


@pytest.fixture
def bert_vocabulary(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A vocabulary of the size of bert-base-uncased's."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "blue"]
    words += [f"[unused{i}]" for i in range(compat.BERT_VOCABULARY_SIZE - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    monkeypatch.setattr(
        BertTokenizer, "from_pretrained", lambda name: BertTokenizer(vocab=vocabulary)
    )
    return vocabulary


def test_every_named_package_imports_in_one_process(hpsv2: Any, imagereward: Any) -> None:
    names = "torch torchvision diffusers transformers peft accelerate snakemake mlflow pandas"
    modules = [importlib.import_module(name) for name in f"{names} open_clip matplotlib".split()]
    modules += [hpsv2, imagereward]
    assert all(sys.modules[module.__name__] is module for module in modules)
    assert {"hpsv2", "ImageReward"} <= set(sys.modules)


def test_hpsv2_lacks_its_vocabulary_before_and_after_the_import(hpsv2: Any) -> None:
    folder = Path(hpsv2.__file__).parent / "src" / "open_clip"
    assert (folder / "tokenizer.py").exists()
    assert not (folder / BPE_VOCABULARY).exists()


def test_hpsv2_is_imported_without_tkinter_and_does_not_replace_turtle() -> None:
    code = (
        "import sys; sys.modules['tkinter'] = None; sys.path.insert(0, 'tests'); "
        "from support.hpsv2_package import import_hpsv2; import_hpsv2(); "
        "assert 'turtle' not in sys.modules; import turtle"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError: import of tkinter halted" in done.stderr
    assert "hpsv2" not in done.stderr


def test_hpsv2_and_open_clip_give_the_same_tokens(hpsv2: Any) -> None:
    import open_clip

    theirs = hpsv2.src.open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    assert torch.equal(theirs, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    assert len(set(theirs[0].tolist())) > 8


def test_hpsv2_and_open_clip_build_the_same_vit_h_14(hpsv2: Any) -> None:
    import open_clip

    def shapes(factory: Any) -> dict[str, torch.Size]:
        # On the meta device the 4 GB of random weights cost nothing.
        with torch.device("meta"):
            model = factory.create_model("ViT-H-14", device="meta")
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    expected = shapes(open_clip)
    assert len(expected) == 686
    assert shapes(hpsv2.src.open_clip) == expected


def test_image_rewards_patches_are_necessary_and_affect_no_other_class(
    imagereward: Any, bert_vocabulary: dict[str, int]
) -> None:
    from transformers import BertTokenizer, PreTrainedModel, modeling_utils

    assert "fairscale" not in sys.modules
    assert importlib.util.find_spec("fairscale") is None
    for name in (
        "apply_chunking_to_forward",
        "prune_linear_layer",
        "find_pruneable_heads_and_indices",
    ):
        assert not hasattr(modeling_utils, name)
    for name in ("all_tied_weights_keys", "get_head_mask", "invert_attention_mask"):
        assert not hasattr(PreTrainedModel, name)
    assert not hasattr(BertTokenizer.from_pretrained(""), "additional_special_tokens_ids")


def test_blips_tokenizer_appends_its_two_tokens(
    imagereward: Any, bert_vocabulary: dict[str, int]
) -> None:
    from ImageReward.models.BLIP.blip import init_tokenizer

    tokenizer = init_tokenizer()
    assert tokenizer.bos_token_id == len(bert_vocabulary)
    assert tokenizer.enc_token_id == len(bert_vocabulary) + 1
    assert tokenizer("a red square").input_ids == [2, 5, 6, 7, 3]


def test_an_incomplete_bert_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertTokenizer

    tiny = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda name: tiny)
    with pytest.raises(RuntimeError, match="hf download bert-base-uncased"):
        compat._blip_tokenizer()


def test_pruning_and_checkpointing_are_refused(imagereward: Any) -> None:
    from ImageReward.models.BLIP import med, vit

    with pytest.raises(NotImplementedError, match="head pruning"):
        med.find_pruneable_heads_and_indices([0], 1, 1, set())
    with pytest.raises(NotImplementedError, match="checkpointing"):
        vit.Block(dim=8, num_heads=1, use_grad_checkpointing=True)


def test_logging_and_warnings_are_restored_after_an_import() -> None:
    def state() -> tuple[object, ...]:
        filters = list(warnings.filters)
        return filters, transformers_logging.get_verbosity(), logging.root.level

    before = state()
    with compat.restored_logging():
        # image-reward does this on import.
        warnings.filterwarnings("ignore")
        transformers_logging.set_verbosity_error()
        logging.root.setLevel(logging.INFO)
        assert state() != before
    assert state() == before
