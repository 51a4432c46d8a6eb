"""The images along an annealed trajectory, and the rewards that are kept of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support.toy import ToyBackbone, toy_rewards
from torch import Tensor, nn

from tafs.common import seeding
from tafs.data import prompts
from tafs.data.prompts import Prompt
from tafs.evaluation import evaluate, trajectory_rewards
from tafs.models import sampling
from tafs.rewards import registry
from tafs.runtime import run_dir
from tafs.shapes import captions

TEXTS = ["a red circle", "a blue star", "two green squares"]


def toy(shift: float = 0.3) -> ToyBackbone:
    """A model whose images lie elsewhere than those of the untrained one."""
    backbone = ToyBackbone()
    backbone.weight, backbone.bias = (nn.Parameter(torch.full((2,), shift)) for _ in range(2))
    return backbone


def stream(seed: int = 0) -> torch.Generator:
    return seeding.generator(seed, "test")


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_there_is_an_image_a_step_and_prompt(steps: int) -> None:
    images = trajectory_rewards.images_along(toy(), TEXTS, steps, stream())
    assert images.shape == (steps, len(TEXTS), 2)
    assert not images.requires_grad


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_image_is_that_of_annealed_sampling_with_the_same_noise(steps: int) -> None:
    backbone, generator = toy(), stream()
    noise = torch.randn(len(TEXTS), 2, generator=generator)
    cond = backbone.encode(TEXTS)
    with torch.no_grad():
        last = sampling.integrate(
            lambda x, t: backbone.velocity(x, t, cond),
            noise,
            sampling.uniform_grid(steps),
            sampling.anneal,
            generator,
        )
    images = trajectory_rewards.images_along(backbone, TEXTS, steps, stream())
    assert torch.equal(images[-1], last)


def test_the_first_image_is_the_models_estimate_from_pure_noise() -> None:
    noise = torch.randn(len(TEXTS), 2, generator=stream())
    images = trajectory_rewards.images_along(toy(shift=0.3), TEXTS, 4, stream())
    torch.testing.assert_close(images[0], noise / 2 + 0.3 * 1 + 0.3)  # at t = 1


def test_equal_generators_give_equal_images() -> None:
    first, second, other = (
        trajectory_rewards.images_along(toy(), TEXTS, 4, stream(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# -- the file --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run_dir.RunDir:
    """A base model's folder; the toy plays the model and the rewards."""
    description = {"method": "base", "prompts": "shapes", "settings": {"world": "shapes"}}
    (tmp_path / "run.json").write_text(json.dumps(description), encoding="utf-8")
    monkeypatch.setattr(evaluate, "load_model", lambda run, iteration: toy())
    monkeypatch.setattr(registry, "load", lambda names, world: toy_rewards())
    return with_prompts(tmp_path, 6)


def with_prompts(folder: Path, count: int, **evaluation: Any) -> run_dir.RunDir:
    text = {"batch": 4, "correlation": {"nfe": 3, "prompts": count}, **evaluation}
    (folder / "evaluation.json").write_text(json.dumps(text), encoding="utf-8")
    return run_dir.RunDir(folder)


def test_the_file_has_a_row_a_prompt_step_and_metric(run: run_dir.RunDir) -> None:
    trajectory_rewards.write(run)
    table = pd.read_parquet(run.trajectory_rewards)
    assert list(table.columns) == ["prompt", "step", "metric", "value"]
    rows = sorted(zip(table["prompt"], table["step"], table["metric"], strict=True))
    assert rows == [(prompt, step, "clip") for prompt in range(6) for step in (1, 2, 3)]


def test_each_value_is_the_reward_of_its_own_image(
    run: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    real = trajectory_rewards.images_along

    def keep(*arguments: Any) -> Tensor:
        kept.append(real(*arguments))
        return kept[-1]

    monkeypatch.setattr(trajectory_rewards, "images_along", keep)
    trajectory_rewards.write(run)
    images = torch.cat(kept, dim=1)
    assert images.shape == (3, 6, 2)  # a batch of four and one of two
    table = pd.read_parquet(run.trajectory_rewards).set_index(["prompt", "step"])["value"]
    for prompt in range(6):
        for step in (1, 2, 3):
            # The toy's reward is the first coordinate.
            assert table[prompt, step] == pytest.approx(images[step - 1, prompt, 0].item())


def test_rewards_are_asked_for_the_prompt_of_their_image(
    run: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    asked: list[list[str]] = []
    real = trajectory_rewards.images_along

    def along(backbone: ToyBackbone, texts: list[str], *rest: Any) -> Tensor:
        drawn.append(texts)
        return real(backbone, texts, *rest)

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        asked.append([prompt.text for prompt in prompts])
        return images[:, 0]

    reward = registry.Reward("clip", score, lambda s: s, differentiable=True)
    monkeypatch.setattr(trajectory_rewards, "images_along", along)
    monkeypatch.setattr(registry, "load", lambda names, world: registry.RewardSet([reward]))
    trajectory_rewards.write(run)
    assert [len(texts) for texts in drawn] == [4, 2]
    assert asked == [texts * 3 for texts in drawn]
    known = {prompt.text for prompt in prompts.read(captions.DATA / "train.jsonl")}
    assert {text for texts in drawn for text in texts} <= known


def test_equal_runs_write_equal_bytes(run: run_dir.RunDir) -> None:
    trajectory_rewards.write(run)
    first = run.trajectory_rewards.read_bytes()
    trajectory_rewards.write(run)
    assert run.trajectory_rewards.read_bytes() == first


def test_more_prompts_than_there_are_is_one_line_that_names_the_key(run: run_dir.RunDir) -> None:
    count = len(prompts.read(captions.DATA / "train.jsonl"))
    message = f"correlation_prompts: {count + 1}, but there are {count} of training"
    with pytest.raises(ValueError, match=message) as caught:
        trajectory_rewards.write(with_prompts(run.folder, count + 1))
    assert "\n" not in str(caught.value)
    assert not run.trajectory_rewards.exists()


def test_every_training_prompt_may_be_drawn(run: run_dir.RunDir) -> None:
    count = len(prompts.read(captions.DATA / "train.jsonl"))
    trajectory_rewards.write(with_prompts(run.folder, count, batch=256))
    assert pd.read_parquet(run.trajectory_rewards)["prompt"].nunique() == count
