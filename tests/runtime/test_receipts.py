"""A receipt describes the files beside it, or does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafs.common.files import sha256
from tafs.runtime import receipts
from tafs.runtime.receipts import Receipt

NEEDS = {"seed": 1, "weights.clip": "a" * 64, "snapshots": [1, 2], "guidance": None}
values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
needs = st.dictionaries(st.text(min_size=1), values)


def finish(folder: Path, content: str = "weights") -> Path:
    file = folder / "snapshots" / "1.safetensors"
    with receipts.replacing(folder, "train", NEEDS, [file]):
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return file


def read(folder: Path) -> Receipt:
    found = receipts.read(folder, "train")
    assert found is not None
    return found


def test_a_receipt_has_the_needs_and_the_files_digests(tmp_path):
    file = finish(tmp_path)
    found = read(tmp_path)
    assert found.needs == NEEDS
    assert found.files["snapshots/1.safetensors"].sha256 == sha256(file)
    assert found.files["snapshots/1.safetensors"].bytes == len("weights")


def test_files_that_are_being_replaced_have_no_receipt(tmp_path):
    finish(tmp_path)
    with pytest.raises(KeyError), receipts.replacing(tmp_path, "train", NEEDS, []):
        assert receipts.read(tmp_path, "train") is None
        raise KeyError
    assert receipts.read(tmp_path, "train") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"needs": {}}', '{"needs": 1, "files": {}}'])
def test_a_damaged_receipt_counts_as_none(tmp_path, text):
    finish(tmp_path)
    receipts.path(tmp_path, "train").write_text(text)
    assert receipts.read(tmp_path, "train") is None


@given(needs)
def test_equal_needs_have_no_differences_and_one_fingerprint(found):
    again = json.loads(json.dumps(found))
    assert receipts.differences(found, again) == []
    assert receipts.fingerprint(found) == receipts.fingerprint(dict(reversed(again.items())))


@given(needs, needs)
def test_every_different_key_is_named_once(old, new):
    found = receipts.differences(old, new)
    keys = [key for key in {*old, *new} if key not in old or key not in new or old[key] != new[key]]
    assert len(found) == len(keys)
    assert (receipts.fingerprint(old) == receipts.fingerprint(new)) == (
        json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    )


def test_differences_show_both_values_and_short_digests():
    new = {**NEEDS, "seed": 2, "weights.clip": "b" * 64, "new": "x" * 99}
    del new["guidance"]
    assert receipts.differences(NEEDS, new) == [
        "guidance: null -> none",
        f'new: none -> "{"x" * 56}...',
        "seed: 1 -> 2",
        f"weights.clip: {'a' * 12} -> {'b' * 12}",
    ]
