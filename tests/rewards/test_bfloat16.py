"""Reward models whose weights are bfloat16, against the same models in float32.

A bfloat16 has 8 bits, so rounding changes it by at most U = 2^-8 of itself, evenly within that: its
standard deviation is U / sqrt(3). A value passes some roundings one after the other, of results and
of as many weights. They are independent, so that their squares add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import tiny_hub
from torch import Tensor, nn

from tafs.data.prompts import Prompt
from tafs.rewards import metrics
from tafs.rewards.metrics import METRICS, Reward
from tafs.rewards.registry import RewardSet

U = 2**-8
DEVIATIONS = 4  # of a normal distribution; one in 16,000 values is further away
# Results in series. A layer: two norms, queries, their products with keys, softmax, attention's
# result and output, both of the feed-forward layer, its activation, two sums. Besides: embedding,
# position, last norm, projection.
ENCODER = 2 * 12 + 4
# A layer of BERT attends twice: six results, a sum and a norm each; five of the feed-forward layer.
# Besides: embedding, position, norm.
FUSION = ENCODER + 2 * (2 * 8 + 5) + 3
PROMPTS = [
    Prompt(text, {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "blue"}]})
    for text in ("a red ring", "a", "a blue kite above 3 hills", "it's 3 o'clock") * 4
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """Tiny random checkpoints of resources.yaml."""
    return tiny_hub.folders(tmp_path_factory.mktemp("resources"))


def load(name: str, folder: Callable[[str], Path], dtype: torch.dtype = torch.float32) -> Reward:
    reward = metrics.plugin(name).build("cpu", folder)
    reward.cast(dtype)
    return reward


def images() -> Tensor:
    """Smooth images, away from 0 and 1, where resized pixels are clipped."""
    coarse = torch.rand(len(PROMPTS), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(0.25 + 0.5 * coarse, (96, 128), mode="bilinear")


def size(networks: Iterable[nn.Module]) -> int:
    """The bytes of the weights."""
    return sum(weight.nbytes for network in networks for weight in network.parameters())


@dataclass(frozen=True)
class Case:
    name: str
    roundings: int  # in series, of results
    # The standard deviation of a score's error, in units of the relative error of an embedding.
    sensitivity: Callable[[Reward], float]


def cosine(reward: Reward) -> float:
    """Of a cosine of two embeddings, whose errors have any direction of the embedding's space."""
    width = reward.networks[0].text_projection
    columns = width.weight.shape[0] if isinstance(width, nn.Linear) else width.shape[1]
    return math.sqrt(2 / columns)


def temperate(reward: Reward) -> float:
    return cosine(reward) * math.exp(3.2) / reward.metric.scale


def head(reward: Reward) -> float:
    """Of a linear function of features with the norm sqrt(width), that of a layer norm's result."""
    model = reward.networks[0]
    features = torch.zeros(model.mlp.input_size, requires_grad=True)
    model.mlp(features).sum().backward()
    return float(features.grad.norm()) / model.std


CASES = (
    Case("clip", ENCODER, cosine),
    Case("pickscore", ENCODER, temperate),
    Case("hpsv2", ENCODER, cosine),
    Case("imagereward", FUSION, head),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_differ_by_the_rounding_of_eight_bits(case, folder):
    whole, half = (load(case.name, folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    expected, found = (reward.score(images(), PROMPTS) for reward in (whole, half))
    assert found.dtype == torch.float32
    error = U * math.sqrt(2 * case.roundings / 3) * case.sensitivity(whole)
    largest = (found - expected).abs().max().item()
    assert 0 < largest < DEVIATIONS * error
    assert torch.equal(found, half.score(images(), PROMPTS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_differ_by_the_rounding_of_eight_bits(case, folder):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        reward, pixels = load(case.name, folder, dtype), images().requires_grad_()
        RewardSet([reward]).differentiate(pixels, PROMPTS)[case.name].sum().backward()
        assert pixels.grad is not None and pixels.grad.dtype == torch.float32
        gradients.append(pixels.grad.flatten(1))
    expected, found = gradients
    assert found.isfinite().all()
    # A gradient passes the roundings of the forward pass, of the weights and of its own results.
    error = U * math.sqrt(3 * case.roundings / 3)
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < relative.max() < DEVIATIONS * error


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_a_cosine_is_one_of_float32_embeddings(name, folder):
    reward = load(name, folder, torch.bfloat16)
    scorer = reward.scorer
    captions = torch.stack([scorer.token_ids(prompt.text) for prompt in PROMPTS])
    with torch.no_grad():
        image = scorer.embed(images())
        caption = torch.cat([scorer.embed_captions(one[None]) for one in captions])
    assert (image.dtype, caption.dtype) == (torch.float32, torch.bfloat16)
    expected = nn.functional.cosine_similarity(image.double(), caption.double())
    if name == "pickscore":  # the temperature is not rounded to bfloat16
        expected = expected * math.exp(3.2) / 26
    torch.testing.assert_close(
        reward.score(images(), PROMPTS).double(), expected, rtol=1e-5, atol=1e-6
    )
    # The model itself computes in bfloat16.
    assert torch.equal(image, image.bfloat16().float())


def test_imagereward_keeps_its_head_in_float32(folder):
    model = load("imagereward", folder, torch.bfloat16).networks[0]
    halved = {name.split(".")[0] for name, p in model.named_parameters() if p.element_size() == 2}
    whole = {name.split(".")[0] for name, p in model.named_parameters() if p.element_size() == 4}
    assert (halved, whole) == ({"blip"}, {"mlp"})


@pytest.mark.parametrize("name", [m.name for m in METRICS.values() if m.resources and not m.served])
def test_exactly_the_castable_resources_take_half_the_memory(name, folder):
    metric = METRICS[name]
    reward = metrics.plugin(name).build("cpu", folder)
    before = [size([network]) for network in reward.networks]
    reward.cast(torch.bfloat16)
    after = [size([network]) for network in reward.networks]
    assert set(metric.castable) <= set(metric.resources)
    if name == "imagereward":  # but for its head
        kept = size([reward.networks[0].mlp])
        before, after = ([total - kept for total in sizes] for sizes in (before, after))
    castable = {
        "geneval": [False, True],  # the detector, and the classifier of colours
        "hpsv3": [False, False],  # its own dtype, on a GPU bfloat16
    }.get(name, [True])
    assert after == [b // 2 if half else b for b, half in zip(before, castable, strict=True)]
    assert any(castable) == bool(metric.castable)


def test_geneval_classifies_colours_with_the_converted_model_alone(folder):
    reward = load("geneval", folder)
    colors = reward.scorer.detector.colors
    whole = colors.weights("kite")
    reward.cast(torch.bfloat16)
    halved = colors.weights("kite")
    assert not torch.equal(whole, halved)
    cosines = (whole * halved).sum(-1)
    # A mean over captions of embeddings, each of which errs as above.
    assert cosines.min() > 1 - (DEVIATIONS * U * math.sqrt(2 * ENCODER / 3)) ** 2 / 2
    assert len(colors(list(images()[:2]), ["kite", "kite"])) == 2
    assert reward.score(images(), PROMPTS).dtype == torch.float32


def test_a_reward_without_a_model_is_what_it_was(folder):
    reward = metrics.plugin("jpeg_compressibility").build("cpu", folder)
    expected = reward.score(images(), PROMPTS)
    reward.cast(torch.bfloat16)
    assert reward.networks == ()
    assert torch.equal(reward.score(images(), PROMPTS), expected)


def test_a_set_of_rewards_knows_the_modules_of_all(folder):
    found = RewardSet([load(name, folder) for name in ("clip", "geneval", "jpeg_compressibility")])
    clip, geneval, _ = found.rewards
    assert found.networks == (*clip.networks, *geneval.networks) and len(found.networks) == 3
