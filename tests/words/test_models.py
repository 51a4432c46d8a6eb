"""The shipped models of the embedded words."""

from __future__ import annotations

import pytest

from tafs.assets import sources
from tafs.assets.sources import AssetSettings
from tafs.shapes import pretrain as shapes
from tafs.shapes import weights
from tafs.words import ROOT, pretrain

SETTINGS = AssetSettings(
    assets="words", lock="", device="cpu", dtype="float32", gradient_checkpointing=False
)
SOURCE = sources.of(SETTINGS)


@pytest.mark.parametrize("name", pretrain.WORDS.bases)
def test_a_shipped_model_is_verified_and_draws_what_the_reward_scores(name):
    backbone = SOURCE.model(name, 24)
    judged = SOURCE.prompts("words", "test")[:4]
    images = shapes.sample(backbone, [p.text for p in judged], "ode", 2, seed=0)
    assert images.shape == (4, 3, 24, 24)
    scores = SOURCE.rewards(["ocr"]).score(images, judged)["ocr"]
    assert ((scores >= 0) & (scores <= 1)).all()
    t5 = backbone.pipeline.components.get("tokenizer_3") or backbone.pipeline.tokenizer_2
    for shipped, built in zip(
        (backbone.pipeline.tokenizer, t5), pretrain.tokenizers(), strict=True
    ):
        assert shipped(judged[0].text).input_ids == built(judged[0].text).input_ids


def test_each_shipped_model_is_smaller_than_20_mb():
    for name in pretrain.WORDS.bases:
        files = [file for file in (ROOT / name).rglob("*") if file.is_file()]
        assert 0 < sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.parametrize("name", pretrain.WORDS.bases)
def test_base_models_spell_better_at_full_steps_than_at_four(name):
    scores = weights.read_facts(ROOT / name)["ocr"]
    full, few = (max(s["overall"] for s in scores[steps].values()) for steps in ("28", "4"))
    assert few < full < 0.9


def test_the_autoencoder_keeps_texts_readable():
    facts = weights.read_facts(ROOT / "words-sd3" / "vae")
    assert facts["reconstruction_accuracy"] >= 0.9
