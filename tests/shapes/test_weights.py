"""The shipped weights are verified before they are loaded."""

import shutil

import pytest

from tafs.shapes import weights


def test_an_altered_or_missing_weight_file_is_refused_and_named(tmp_path):
    root = tmp_path / "weights"
    shutil.copytree(weights.ROOT / "clip", root / "clip")
    weights.write_manifest(root)
    assert weights.verify("clip", root) == root / "clip"
    file = root / "clip" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: "):
        weights.verify("clip", root)
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors: "):
        weights.verify("clip", root)
