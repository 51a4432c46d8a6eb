"""The device and the prompts' length of a source, and how it checks its rewards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_hub

from tafs.assets import sources
from tafs.common import errors
from tafs.experiment.specs import AssetSettings
from tafs.models import catalog
from tafs.rewards import golden, statistics
from tafs.rewards.registry import RewardSet

JOB, VISIBLE = "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    "gpus, environment, used",
    [
        (0, {}, "cpu"),
        (1, {}, "cuda:0"),
        (3, {}, "cuda:2"),
        (1, {JOB: "7"}, "cpu"),
        (1, {JOB: "7", VISIBLE: "0"}, "cuda:0"),
    ],
)
def test_auto_is_a_gpu_where_a_job_has_one(
    gpus: int, environment: dict[str, str], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "getpid", lambda: 3 * 7 + 2)
    for name in (JOB, VISIBLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = AssetSettings(
        assets="shapes", lock="", device="auto", dtype="float32", gradient_checkpointing=False
    )
    assert sources.of(settings).device == used


@pytest.mark.parametrize("assets", ["shapes", "words", "hub"])
def test_a_reward_that_needs_no_download_must_give_its_shipped_scores(
    assets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "_verified", {})
    settings = AssetSettings(
        assets=assets, lock="", device="cpu", dtype="float32", gradient_checkpointing=False
    )
    source = sources.of(settings)
    source.rewards(["jpeg_compressibility", "ocr"])
    monkeypatch.setattr(golden, "_verified", {})
    monkeypatch.setattr(statistics, "QUALITY", 94)
    with pytest.raises(errors.RunFailed, match="reward jpeg_compressibility: the golden image"):
        source.rewards(["jpeg_compressibility"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], sources.HubAssets]:
    """The hub's source for a `rewards_dtype`, with tiny random checkpoints."""
    folder = tiny_hub.folders(tmp_path)
    monkeypatch.setattr(sources.HubAssets, "folder", lambda _, resource: folder(resource))

    def source(dtype: str) -> sources.HubAssets:
        settings = AssetSettings(
            assets="hub",
            lock="",
            device="cpu",
            dtype="float32",
            gradient_checkpointing=False,
            rewards_dtype=dtype,
        )
        return sources.HubAssets(settings, 0)

    return source


def dtypes(rewards: RewardSet) -> set[torch.dtype]:
    return {weight.dtype for network in rewards.networks for weight in network.parameters()}


def test_rewards_are_bfloat16_in_training_alone(
    hub: Callable[[str], sources.HubAssets],
) -> None:
    names = ["pickscore", "clip", "hpsv2"]
    assert dtypes(hub("bfloat16").training_rewards(names)) == {torch.bfloat16}
    assert dtypes(hub("float32").training_rewards(names)) == {torch.float32}
    chosen = hub("bfloat16")
    for strict in (False, True):  # trajectories, and all other scores of an evaluation
        found = chosen.rewards([*names, "imagereward", "geneval"], strict_geneval=strict)
        assert dtypes(found) == {torch.float32}


def test_golden_scores_are_checked_before_a_reward_is_converted(
    hub: Callable[[str], sources.HubAssets], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(
        golden, "verify_shipped", lambda reward, _: checked.append(dtypes(RewardSet([reward])))
    )
    rewards = hub("bfloat16").training_rewards(["clip", "jpeg_compressibility", "hpsv2"])
    assert checked == [{torch.float32}, set(), {torch.float32}]
    assert dtypes(rewards) == {torch.bfloat16}


@pytest.mark.parametrize(("chosen", "tokens"), [(None, 10), (6, 6)])
def test_trained_models_take_prompts_of_the_scales_length(chosen: int | None, tokens: int) -> None:
    settings = AssetSettings(
        assets="shapes",
        lock="",
        device="cpu",
        dtype="float32",
        gradient_checkpointing=False,
        max_sequence_length=chosen,
    )
    backbone = sources.of(settings).model("shapes-flux", 24)
    assert backbone.encode(["a red ring"]).embeds.shape[1] == tokens
    compared = catalog.read()["flux-schnell"]
    assert settings.length(compared) == compared.max_sequence_length
