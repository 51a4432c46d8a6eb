"""Trajectory rewards: the images along an annealed trajectory, and the file of their rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.evaluated import copied, write
from support.toy import ToyBackbone, streams, toy_rewards
from torch import Tensor, nn

from tafs.assets.sources import ShapesAssets
from tafs.data.prompts import Prompt
from tafs.evaluation import generate, trajectory_rewards
from tafs.experiment import run_inputs
from tafs.experiment.specs import TrajectorySpec
from tafs.models import sampling
from tafs.rewards.registry import RewardSet
from tafs.runtime.run_dir import RunDir

TEXTS = ["a red circle", "a blue star", "two green squares"]


def toy(shift: float = 0.3) -> ToyBackbone:
    """A trained model, whose images differ from those of the untrained one."""
    backbone = ToyBackbone()
    backbone.weight, backbone.bias = (nn.Parameter(torch.full((2,), shift)) for _ in range(2))
    return backbone


def test_the_last_image_is_that_of_annealed_sampling_with_the_same_noise():
    steps = 4
    backbone, generators = toy(), streams(len(TEXTS))
    noise = generators.randn([2])
    cond = backbone.encode(TEXTS)
    with torch.no_grad():
        last = sampling.integrate(
            lambda x, t: backbone.velocity(x, t, cond),
            noise,
            sampling.uniform_grid(steps),
            sampling.anneal,
            generators,
        )
    images = trajectory_rewards.trajectory_images(backbone, TEXTS, steps, streams(len(TEXTS)))
    assert images.shape == (steps, len(TEXTS), 2)
    assert not images.requires_grad
    assert torch.equal(images[-1], last)


def test_the_first_image_is_the_models_estimate_from_pure_noise():
    noise = streams(len(TEXTS)).randn([2])
    images = trajectory_rewards.trajectory_images(toy(shift=0.3), TEXTS, 4, streams(len(TEXTS)))
    torch.testing.assert_close(images[0], noise / 2 + 0.3 * 1 + 0.3)  # at t = 1


@pytest.fixture
def run(ready, tmp_path, monkeypatch) -> RunDir:
    """A run with six trajectories of three steps, of the toy model and rewards."""
    monkeypatch.setattr(generate, "load_model", lambda *_: toy())
    monkeypatch.setattr(ShapesAssets, "rewards", lambda *_: toy_rewards())
    monkeypatch.setattr(trajectory_rewards, "pixels", lambda images: images)  # they are latents
    run = copied(ready, tmp_path)
    write(run, batch=4, trajectories=TrajectorySpec(nfe=3, prompts=6))
    return run


def training_prompts(run: RunDir) -> list[Prompt]:
    spec = run_inputs.run_spec(run)
    return run_inputs.asset_source(spec).prompts(spec.prompts, "train")


def test_each_value_is_the_reward_of_its_image_and_prompt(run, monkeypatch):
    drawn: list[tuple[list[str], Tensor]] = []
    asked: list[list[str]] = []
    images_of, score = trajectory_rewards.trajectory_images, RewardSet.score

    def watched(backbone: ToyBackbone, texts: list[str], *rest: Any) -> Tensor:
        drawn.append((texts, images_of(backbone, texts, *rest)))
        return drawn[-1][1]

    def scored(self: RewardSet, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        asked.append([prompt.text for prompt in prompts])
        return score(self, images, prompts)

    monkeypatch.setattr(trajectory_rewards, "trajectory_images", watched)
    monkeypatch.setattr(RewardSet, "score", scored)
    trajectory_rewards.write(run)
    assert [len(texts) for texts, _ in drawn] == [4, 2]  # batches
    assert asked == [texts * 3 for texts, _ in drawn]
    known = {prompt.text for prompt in training_prompts(run)}
    assert {text for texts, _ in drawn for text in texts} <= known
    images = torch.cat([images for _, images in drawn], dim=1)
    table = pd.read_parquet(run.trajectory_rewards)
    assert list(table.columns) == ["prompt", "step", "metric", "value"]
    assert sorted(zip(table["prompt"], table["step"], table["metric"], strict=True)) == [
        (prompt, step, "clip") for prompt in range(6) for step in (1, 2, 3)
    ]
    for prompt, step, _, value in table.itertuples(index=False):
        assert value == pytest.approx(images[step - 1, prompt, 0].item())
    kept = load_file(run.trajectory_images)
    shown = kept["prompts"].tolist()
    assert torch.equal(kept["images"], images[:, shown].transpose(0, 1))
    with safe_open(run.trajectory_images, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
    assert captions == [[text for texts, _ in drawn for text in texts][p] for p in shown]


def test_every_training_prompt_can_be_drawn_but_no_more(run):
    count = len(training_prompts(run))
    write(run, batch=256, trajectories=TrajectorySpec(nfe=1, prompts=count))
    files = []
    for _ in range(2):
        trajectory_rewards.write(run)
        files.append(run.trajectory_rewards.read_bytes())
    assert files[0] == files[1]
    assert pd.read_parquet(run.trajectory_rewards)["prompt"].nunique() == count
    run.trajectory_rewards.unlink()
    write(run, trajectories=TrajectorySpec(nfe=1, prompts=count + 1))
    message = f"correlation_prompts: {count + 1} is more than the {count} training prompts"
    with pytest.raises(ValueError, match=message):
        trajectory_rewards.write(run)
    assert not run.trajectory_rewards.exists()
