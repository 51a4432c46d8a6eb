"""The embedded reward models: accuracy, invariances, and reward hacking."""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from tafs.data import prompts
from tafs.data.plugins.shapes import FOLDER
from tafs.rewards import registry
from tafs.shapes import annotators, pretrain, scenes, weights
from tafs.shapes import rewards as shapes
from tafs.shapes.render import render

NAMES = ("geneval", *shapes.LEARNED)


@pytest.fixture(scope="module")
def rewards() -> registry.RewardSet:
    return registry.load(NAMES, shapes.build)


@pytest.fixture(scope="module")
def scenes_of_captions():
    """400 held-out captions, matching images, and images that differ in one requirement."""
    rng = np.random.default_rng(5)
    drawn = prompts.draw(prompts.read(FOLDER / "test.jsonl"), 400, rng)
    right = render([scenes.sample_scene(p.row, rng) for p in drawn])
    wrong = render([scenes.sample_scene(annotators.alter(dict(p.row), rng), rng) for p in drawn])
    return drawn, right, wrong


@pytest.mark.parametrize("name", NAMES)
def test_matching_images_score_higher_than_altered_ones(rewards, scenes_of_captions, name):
    if name in shapes.LEARNED:
        assert weights.read_facts(weights.ROOT / name)["pair_accuracy"] >= 0.85
    drawn, right, wrong = scenes_of_captions
    better = rewards.score(right, drawn)[name] > rewards.score(wrong, drawn)[name]
    assert better.float().mean() > 0.75


def test_a_held_out_metric_detects_a_checkerboard_that_geneval_ignores(rewards, scenes_of_captions):
    drawn, right, _ = scenes_of_captions
    y, x = np.mgrid[: scenes.IMAGE_SIZE, : scenes.IMAGE_SIZE]
    board = torch.tensor((x + y) % 2).float() * 0.08
    clean, textured = rewards.score(right, drawn), rewards.score((right - board).clamp(0, 1), drawn)
    assert (textured["geneval"] - clean["geneval"]).mean() > -0.03
    detected = {
        name: (clean[name] > textured[name]).float().mean().item()
        for name in ("hpsv2", "imagereward", "unifiedreward")
    }
    assert max(detected.values()) > 0.9, detected


def test_published_scales_are_those_of_the_published_models(rewards, scenes_of_captions):
    drawn, right, _ = scenes_of_captions
    reported = rewards.report(rewards.score(right, drawn))
    assert reported["clip"].abs().max() <= 100
    assert reported["pickscore"].abs().max() <= 26
    assert reported["hpsv2"].abs().max() <= 1
    assert reported["unifiedreward"].min() >= 1 and reported["unifiedreward"].max() <= 5


def test_strict_geneval_is_0_or_1_and_graded_is_in_between():
    drawn = prompts.read(FOLDER / "test.jsonl")[:30]
    rng = np.random.default_rng(0)
    images = render([scenes.sample_scene(annotators.alter(dict(p.row), rng), rng) for p in drawn])
    build = partial(shapes.build, strict_geneval=True)
    strict = registry.load(["geneval"], build).score(images, drawn)["geneval"]
    graded = registry.load(["geneval"], shapes.build).score(images, drawn)["geneval"]
    assert set(strict.tolist()) <= {0.0, 1.0}
    assert ((graded > 0) & (graded < 1)).any()
    assert (graded[strict == 1] == 1).all()


def test_the_shipped_models_are_smaller_than_20_mb():
    total = sum(file.stat().st_size for file in weights.ROOT.rglob("*") if file.is_file())
    assert total < 20e6


@pytest.mark.parametrize("name", pretrain.BASES)
def test_base_models_are_clearly_worse_at_four_steps_with_the_best_sampler(name):
    facts = weights.read_facts(weights.ROOT / name)
    scores = facts["strict_geneval_other_noise"]
    full, few = (max(scores[steps].values()) for steps in ("28", "4"))
    assert 0.45 <= full <= 0.65 and few <= 0.75 * full
    recipes = [asdict(recipe) for recipe in pretrain.BASES[name].recipes]
    assert [cycle["recipe"] for cycle in facts["cycles"]] == recipes


def test_the_models_of_learned_rewards_are_on_the_given_device():
    for name in shapes.LEARNED:
        scorer = shapes.build(name, "meta").scorer
        assert {p.device.type for p in scorer.model.parameters()} == {"meta"}
