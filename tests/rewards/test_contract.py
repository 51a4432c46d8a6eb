"""Every reward that is found keeps the contract of `tafs.rewards.metrics.Reward`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import packages, tiny_hub

from tafs.assets import lockfile
from tafs.assets.sources import AssetSettings, ShapesAssets
from tafs.data.prompts import Prompt
from tafs.rewards import metrics, template
from tafs.rewards.metrics import METRICS, Reward, RewardPlugin

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = AssetSettings(
    assets="shapes", lock="", device="cpu", dtype="float32", gradient_checkpointing=False
)
EMBEDDED = ShapesAssets(SETTINGS, 0)
METADATA = {"include": [{"class": "bench", "count": 1}], "tag": "single_object"}
PROMPTS = [Prompt(text, {**METADATA, "prompt": text}) for text in ("a red ring", "a", "a red ring")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """Tiny random checkpoints of resources.yaml."""
    return tiny_hub.folders(tmp_path_factory.mktemp("resources"))


@pytest.fixture(
    params=[
        *[f"hub {m.name}" for m in METRICS.values() if not m.served],
        *[f"shapes {name}" for name in EMBEDDED.metrics("shapes")],
    ]
)
def reward(request, folder) -> Reward:
    source, name = request.param.split()
    if source == "shapes":
        return EMBEDDED.rewards([name]).rewards[0]
    return metrics.plugin(name).build("cpu", folder)


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.25 + 0.5 * torch.rand(count, 3, 24, 24, generator=generator)


def test_scores_are_float32_and_repeatable(reward):
    scores = reward.score(images(), PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, reward.score(images(), PROMPTS))


def test_scores_do_not_depend_on_batch_or_order(reward):
    together = reward.score(images(), PROMPTS)
    order = [2, 0, 1]
    shuffled = reward.score(images()[order], [PROMPTS[i] for i in order])
    alone = [reward.score(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)


def with_pixel(value: float) -> torch.Tensor:
    changed = images()
    changed[1, 0, 0, 0] = value
    return changed


def test_wrong_images_are_refused_in_one_line_that_names_the_reward(reward):
    for wrong, prompts, message in (
        (images()[0], PROMPTS, "must be [B, 3, H, W], not [3, 24, 24]"),
        (images()[:, :2], PROMPTS, "must be [B, 3, H, W], not [3, 2, 24, 24]"),
        (images()[:, :1].expand(-1, 4, -1, -1), PROMPTS, "not [3, 4, 24, 24]"),
        (images()[..., :0], PROMPTS, "must be [B, 3, H, W], not [3, 3, 24, 0]"),
        (torch.tensor(0.5), PROMPTS, "must be [B, 3, H, W], not []"),
        ((images() * 255).byte(), PROMPTS, "floating-point numbers in [0, 1], not torch.uint8"),
        (images() * 255, PROMPTS, "must be in [0, 1], not from"),
        (images() * 2 - 1, PROMPTS, "must be in [0, 1], not from -0.5"),
        (images(), PROMPTS[:2], "3 images, but 2 prompts"),
        (images(), [*PROMPTS, *PROMPTS], "3 images, but 6 prompts"),
        (images(0), PROMPTS, "0 images, but 3 prompts"),
        *[
            (with_pixel(value).to(dtype), PROMPTS, "image 1 of 3 holds NaN or infinity")
            for value in (math.nan, math.inf, -math.inf)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ],
    ):
        with pytest.raises(ValueError, match=f"^reward {reward.name}: .+") as error:
            reward.score(wrong, prompts)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_images_of_any_floating_point_type_are_scored_as_float32(reward):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        converted = images().to(dtype)
        scores = reward.score(converted, PROMPTS)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, reward.score(converted.float(), PROMPTS))


def test_an_empty_batch_has_no_scores(reward):
    for dtype in (torch.float32, torch.bfloat16):
        scores = reward.score(images(0).to(dtype), [])
        assert scores.shape == (0,) and scores.dtype == torch.float32


def test_the_gradient_reaches_the_images_exactly_if_the_reward_says_so(reward):
    pixels = images().requires_grad_()
    scores = reward.score(pixels, PROMPTS)
    assert scores.requires_grad == reward.differentiable
    if reward.differentiable:
        scores.sum().backward()
        assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()


def test_reported_scores_are_the_training_scores_times_the_scale(reward):
    scores = torch.tensor([0.0, 0.5, float("nan")])
    expected = reward.metric.scale * scores
    assert torch.equal(reward.report(scores).nan_to_num(-1), expected.nan_to_num(-1))
    assert reward.record().keys() >= {"name", "version", "scale"}


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_the_description_is_complete(metric):
    assert metric.title and metric.unit and metric.version
    assert metric.digits >= 0 and metric.factor > 0
    assert (metric.scale > 0) == metric.higher_is_better
    assert set(metric.resources) <= set(lockfile.read(ROOT / "resources.yaml"))


def test_a_hub_reward_scores_images_of_any_shape(folder):
    for name in [m.name for m in METRICS.values() if not m.served]:
        reward = metrics.plugin(name).build("cpu", folder)
        for height, width in ((1, 1), (3, 700), (2000, 1)):
            scores = reward.score(torch.full((1, 3, height, width), 0.5), PROMPTS[:1])
            assert scores.isfinite().all(), (name, height, width)


def test_an_embedded_reward_refuses_images_of_another_size():
    rewards = EMBEDDED.rewards(EMBEDDED.metrics("shapes")).rewards
    for reward in rewards:
        message = rf"^reward {reward.name}: images must be \[B, 3, 24, 24\], not \[1, 3, 32, 24\]$"
        with pytest.raises(ValueError, match=message):
            reward.score(torch.full((1, 3, 32, 24), 0.5), PROMPTS[:1])


@pytest.mark.parametrize("name", [m.name for m in METRICS.values() if m.served])
def test_a_served_reward_has_a_client_and_cannot_be_built_in_the_training_process(name, folder):
    plugin = metrics.plugin(name)
    with pytest.raises(ValueError, match=f"reward '{name}' is scored by a server"):
        plugin.build("cpu", folder)
    client = plugin.connect("http://127.0.0.1:1", folder, 7)
    assert (client.metric, client.model, client.images) == (plugin.metric, plugin.metric.version, 7)


def test_an_unknown_reward_is_refused_with_those_available():
    with pytest.raises(ValueError, match="unknown reward 'clipscore' .*geneval, pickscore, clip"):
        metrics.plugin("clipscore")


def test_the_template_is_a_reward(tmp_path):
    file = template.write("jpeg_size", tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)  # noqa: S102
    plugin = namespace["REWARD"]
    assert isinstance(plugin, RewardPlugin) and plugin.metric.name == "jpeg_size"
    reward = plugin.build("cpu", lambda resource: tmp_path / resource)
    flat = torch.full((1, 3, 24, 24), 0.5)
    scores = reward.score(torch.cat([flat, images(1)]), PROMPTS[:2])
    assert scores[0] > scores[1]
    assert reward.report(scores)[0] > 0
    test_scores_are_float32_and_repeatable(reward)
    test_wrong_images_are_refused_in_one_line_that_names_the_reward(reward)
    test_images_of_any_floating_point_type_are_scored_as_float32(reward)
    test_an_empty_batch_has_no_scores(reward)
    test_the_gradient_reaches_the_images_exactly_if_the_reward_says_so(reward)
    test_the_description_is_complete(plugin.metric)
    with pytest.raises(ValueError, match="'clip' is taken"):
        template.write("clip", tmp_path)


def test_a_reward_of_an_installed_package_is_found_and_scores(tmp_path):
    source = template.TEMPLATE.replace("{name}", "installed").replace("{title}", "Installed")
    code = (
        "import sys, json; from tafs.rewards.metrics import METRICS; names = list(METRICS); "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        "import torch; from tafs.assets.sources import *; "
        f"source = of(AssetSettings(**{SETTINGS.model_dump()})); "
        "assert source.metrics('shapes')[-1] == 'installed'; "
        "assert 'rewards.installed' in source.digests(['installed']); "
        "scores = source.rewards(['installed']).score(torch.rand(2, 3, 24, 24), "
        "source.prompts('shapes', 'test')[:2]); "
        "print(json.dumps([names, scores['installed'].tolist()]))"
    )
    points = {"tafs.rewards": {"installed": "their_package.jpeg"}}
    with packages.installed(tmp_path, {"jpeg.py": source}, points):
        out = packages.run_with(tmp_path, code)
    names, scores = json.loads(out)
    assert names[: len(metrics.ORDER)] == [*metrics.ORDER] and "installed" in names
    assert all(score < 0 for score in scores)
