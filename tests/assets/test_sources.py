"""The device that a source's models and rewards are on."""

from __future__ import annotations

import os

import pytest
import torch

from tafs.assets import sources
from tafs.experiment.specs import AssetSettings

JOB, VISIBLE = "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    "gpus, environment, used",
    [
        (0, {}, "cpu"),
        (1, {}, "cuda:0"),
        (3, {}, f"cuda:{os.getpid() % 3}"),
        (1, {JOB: "7"}, "cpu"),
        (1, {JOB: "7", VISIBLE: "0"}, "cuda:0"),
    ],
)
def test_auto_is_a_gpu_where_a_job_has_one(
    gpus: int, environment: dict[str, str], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in (JOB, VISIBLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = AssetSettings(
        assets="shapes", lock="", device="auto", dtype="float32", gradient_checkpointing=False
    )
    assert sources.of(settings).device == used
