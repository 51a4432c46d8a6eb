"""The shipped weights are verified before they are loaded."""

import shutil

import pytest
import torch
from support.checkpoints import EMBEDDED, embedded

from tafs.common.files import sha256
from tafs.shapes import scorers, weights


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


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_pipeline_is_written_as_it_is_shipped(name, tmp_path):
    weights.save_pipeline(embedded(name).pipeline(), tmp_path)
    written = {str(file.relative_to(tmp_path)): file for file in tmp_path.glob("*/*.safetensors")}
    written |= {str(f.relative_to(tmp_path)): f for f in tmp_path.glob("text_encoder*/config.json")}
    assert written
    for path, file in written.items():
        assert sha256(file) == sha256(weights.ROOT / name / path), path
        assert file.stat().st_mode == (tmp_path / "model_index.json").stat().st_mode, path


def test_a_reward_model_is_written_with_the_mode_of_other_files(tmp_path):
    scorer = scorers.FusionScorer(1)
    weights.save_scorer(scorer, tmp_path)
    modes = [(tmp_path / f).stat().st_mode for f in ("model.safetensors", "config.json")]
    assert modes[0] == modes[1]
    assert {p.dtype for p in scorer.parameters()} == {torch.float32}
