"""HPSv3 against the scores that its package gives to the same weights and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_rewards

from tafs.data.prompts import Prompt
from tafs.rewards import golden
from tafs.rewards.hpsv3 import HPSv3, resized

# `HPSv3RewardInferencer.reward` of hpsv3 1.0.0 with transformers 4.45.2, for the checkpoint below
# and the first golden images, each pixel drawn as 2 x 2 (448 x 448, not resized) or once (224).
PUBLISHED = {
    2: [0.01068595, -0.36683190, -0.45035687, -0.04249288],
    1: [0.01068595, -0.36512229, -0.45274508, -0.04101111],
}
# The package rounds resized pixels to 8 bits, which the random weights amplify.
TOLERANCE = {2: 2e-6, 1: 5e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hpsv3")
    size = tiny_rewards.qwen2_vl(root / "qwen")
    tiny_rewards.hpsv3(root / "HPSv3.safetensors", size)
    return root


@pytest.fixture(scope="module")
def reward(folder: Path) -> HPSv3:
    return HPSv3(folder / "HPSv3.safetensors", folder / "qwen")


@pytest.mark.parametrize("times", PUBLISHED)
def test_hpsv3_equals_its_package(reward, times):
    first = [*golden.images().values()][: len(PUBLISHED[times])]
    drawn = np.stack(first).repeat(times, axis=1).repeat(times, axis=2)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255
    found = reward(images, [*golden.PROMPTS.values()][: len(first)]).tolist()
    assert found == pytest.approx(PUBLISHED[times], abs=TOLERANCE[times])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((24, 24), (448, 448)),
        ((1, 1), (448, 448)),
        ((1024, 512), (616, 308)),
        ((300, 451), (392, 560)),
        ((2000, 1), (20048, 28)),
    ],
)
def test_images_are_resized_to_multiples_of_28(size, expected):
    assert resized(*size, 28) == expected


def test_a_prompt_with_the_models_tokens_is_refused(reward):
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(ValueError, match="reward hpsv3: the prompt .* has a special token"):
            reward(torch.zeros(1, 3, 56, 56), [Prompt(f"a {token}", {})])


@pytest.mark.parametrize("missing", ["model.norm.weight", "rm_head.3.bias"])
def test_a_missing_weight_is_refused_by_its_name(folder, tmp_path, missing):
    state = load_file(folder / "HPSv3.safetensors")
    del state[missing]
    save_file(state, tmp_path / "HPSv3.safetensors")
    named = missing.removeprefix("rm_head.").removeprefix("model.")
    with pytest.raises(ValueError, match=rf"^reward hpsv3: .*{named}.*; fetch the model again$"):
        HPSv3(tmp_path / "HPSv3.safetensors", folder / "qwen")


def test_truncated_and_unfit_files_are_refused(folder, tmp_path):
    file = tmp_path / "HPSv3.safetensors"
    content = (folder / "HPSv3.safetensors").read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="reward hpsv3: .* is damaged"):
        HPSv3(file, folder / "qwen")
    tiny_rewards.qwen_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((folder / "qwen" / "config.json").read_text())
    with pytest.raises(ValueError, match="the tokenizer has .* tokens, the model reads"):
        HPSv3(folder / "HPSv3.safetensors", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        HPSv3(folder / "HPSv3.safetensors", tmp_path)
