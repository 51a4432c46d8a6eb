"""The patches of image-reward are necessary, work, and do not affect other code."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from tafs.rewards import compat


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


def test_image_rewards_patches_are_necessary_and_affect_no_other_class(
    imagereward: Any, bert_vocabulary: dict[str, int]
) -> None:
    from transformers import BertTokenizer, PreTrainedModel, modeling_utils

    assert "fairscale" not in sys.modules
    assert importlib.util.find_spec("fairscale") is None
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):
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
