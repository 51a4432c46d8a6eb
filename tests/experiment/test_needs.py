"""What the outcome of a stage depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafs.assets import sources
from tafs.assets.sources import AssetSettings, ShapesAssets
from tafs.experiment import needs


def test_a_check_of_rewards_depends_on_their_own_golden_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first use of another metric does not cause another check."""
    file = tmp_path / "golden.json"
    monkeypatch.setattr(ShapesAssets, "golden_scores", file)
    source = sources.of(
        AssetSettings(
            assets="shapes", lock="", device="cpu", dtype="float32", gradient_checkpointing=False
        )
    )
    digest = source.reward_digest("clip")
    found = []
    for stored in (
        {"clip": {digest: {"disc": 0.25}}},
        {"clip": {digest: {"disc": 0.25}, "other weights": {}}, "hpsv3": {"aaa": {"disc": 1.0}}},
        {"clip": {digest: {"disc": 0.5}}},
    ):
        file.write_text(json.dumps(stored))
        found.append(needs.check_rewards(source, ["clip"]))
    assert found[0] == found[1] != found[2]
