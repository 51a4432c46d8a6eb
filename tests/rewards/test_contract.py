"""Every reward that is found keeps the contract of `tafs.rewards.metrics.Reward`."""

from __future__ import annotations

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


def test_wrong_images_are_refused_in_one_line_that_names_the_reward(reward):
    broken = images()
    broken[1, 0, 0, 0] = float("nan")
    for wrong, prompts in (
        (images()[0], PROMPTS),
        (images()[:, :2], PROMPTS),
        (images().half(), PROMPTS),
        (images(0), []),
        (images(), PROMPTS[:2]),
        (broken, PROMPTS),
    ):
        with pytest.raises(ValueError, match=f"^reward {reward.name}: .+") as error:
            reward.score(wrong, prompts)
        assert "\n" not in str(error.value)


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


def test_a_served_reward_cannot_be_built_in_the_training_process(folder):
    [served] = [metric.name for metric in METRICS.values() if metric.served]
    with pytest.raises(ValueError, match=f"reward '{served}' is scored by a server"):
        metrics.plugin(served).build("cpu", folder)


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
    assert '"unifiedreward", "installed"], [-' in out
