"""Golden scores: stored scores of fixed images, which detect changes of a reward's output.

Rewards that need no download are compared with golden_scores.json, which the package ships, when
they are loaded. For the others, the first scores of a reward's weights are stored beside the lock
file; keep both under version control. `python -m tafs.evaluation.check_rewards RUN_DIR OUT` does so
for every reward of the run's asset source, and every evaluation for those that it uses. Later, they
compare, and fail if a library, driver or precision changes a score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from tafs.common import errors, files, locks
from tafs.data.prompts import Prompt
from tafs.rewards.metrics import Metric, Reward

SHIPPED = Path(__file__).with_name("golden_scores.json")
SIDE = 224  # pixels
TOLERANCE = 1e-3  # relative to the stored score
# Absolute, in units of the training score. 1e-4 are 5 of the images' 50176 pixels, which rounding
# may move over a threshold. A server's output depends on how requests are batched; 0.1 is half a
# grade. A text changes by whole letters: one that is read into an image without text is at most
# 1/14 of the required text, and one of the drawn text is 1/4.
NEAR_ZERO, SERVED_TOLERANCE, READING_TOLERANCE = 1e-4, 0.1, 0.1

# By reward, digest of the weights (of shipped scores: the metric's version), and image.
Stored = dict[str, dict[str, dict[str, float]]]

# Captions with GenEval's metadata and COCO's classes, and with a question as GenEval 2 has them,
# which every reward can score. The last one quotes the text of its image.
PROMPTS = {
    name: Prompt(
        f"a photo of {text}",
        {"tag": tag, "include": include, "vqa_list": [(f"Does the image show {text}?", "Yes")]},
    )
    for name, text, tag, include in (
        ("gradient", "a blue kite", "colors", [{"class": "kite", "count": 1, "color": "blue"}]),
        ("disc", "a red frisbee", "colors", [{"class": "frisbee", "count": 1, "color": "red"}]),
        (
            "two discs",
            "a green apple left of a blue sports ball",
            "position",
            [
                {"class": "sports ball", "count": 1, "color": "blue"},
                {"class": "apple", "count": 1, "color": "green", "position": ["left of", 0]},
            ],
        ),
        ("rings", "a bench", "single_object", [{"class": "bench", "count": 1}]),
        (
            "text",
            'a stop sign that says "STOP"',
            "single_object",
            [{"class": "stop sign", "count": 1}],
        ),
    )
}
# The letters S, T, O and P, 5 x 7 pixels each, with a column between two of them; #: ink.
LETTERS = (
    ".###..#####..###..####.",
    "#...#...#...#...#.#...#",
    "#.......#...#...#.#...#",
    ".###....#...#...#.####.",
    "....#...#...#...#.#....",
    "#...#...#...#...#.#....",
    ".###....#....###..#....",
)


def images() -> dict[str, np.ndarray]:
    """The images [SIDE, SIDE, 3], uint8, by name in the order of PROMPTS."""
    y, x = np.mgrid[:SIDE, :SIDE]

    def disc(column: int, radius: int) -> np.ndarray:
        return ((x - column) ** 2 + (y - SIDE // 2) ** 2 < radius**2)[..., None]

    white = np.full((SIDE, SIDE, 3), 255)
    two = np.where(disc(60, 40), (20, 160, 50), white)
    rings = ((x - SIDE // 2) ** 2 + (y - SIDE // 2) ** 2) // 32 % 256
    sign = (abs(y - SIDE // 2) + abs(x - SIDE // 2) < SIDE * 7 // 10)[..., None]
    drawn = {
        "gradient": np.stack([255 - x, (x + y) // 2, x], axis=-1),
        "disc": np.where(disc(SIDE // 2, 70), (220, 30, 30), white),
        "two discs": np.where(disc(164, 40), (30, 60, 230), two),
        "rings": np.stack([rings, 255 - rings, y], axis=-1),
        "text": np.where(_lettered(y, x), 255, np.where(sign, (190, 20, 30), white)),
    }
    return {name: image.astype(np.uint8) for name, image in drawn.items()}


def _lettered(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether the pixels [SIDE, SIDE, 1] are ink of LETTERS, which fill most of the width."""
    ink = np.array([[mark == "#" for mark in row] for row in LETTERS])
    height, width = ink.shape
    unit = max(1, SIDE // 28)  # pixels
    row = (y - (SIDE - unit * height) // 2) // unit
    column = (x - (SIDE - unit * width) // 2) // unit
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (inside & ink[row.clip(0, height - 1), column.clip(0, width - 1)])[..., None]


def scores(reward: Reward, device: torch.device | str = "cpu") -> dict[str, float]:
    """Training-scale scores by image, in the order of PROMPTS."""
    pixels = torch.from_numpy(np.stack(list(images().values()))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = reward.score(pixels.to(device), list(PROMPTS.values()))
    return dict(zip(PROMPTS, map(float, found), strict=True))


def check(metric: Metric, scores: Mapping[str, float], stored: Mapping[str, float]) -> None:
    """Compare a reward's scores by image with the stored ones, where an image has both.

    Raises:
        RunFailed: a score differs by more than the tolerance of such metrics and by more than the
            relative TOLERANCE; names reward, image and scores.
    """
    tolerance = NEAR_ZERO
    if metric.served:
        tolerance = SERVED_TOLERANCE
    elif metric.quotes:
        tolerance = READING_TOLERANCE
    for image in [image for image in scores if image in stored]:
        found, expected = scores[image], stored[image]
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=tolerance):
            raise errors.RunFailed(
                f"reward {metric.name}: the golden image {image!r} scores {found:.6g} instead of "
                f"{expected:.6g}; restore the library, driver or precision that it was stored with"
            )


def record(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Check rewards whose golden scores are stored, and store those of the others.

    A printed line names every reward whose scores are stored, or those of images that an earlier
    version did not have. Rewards with shipped scores are checked by these.

    Args:
        rewards: the rewards, on `device`.
        digests: SHA-256 of each reward's weights, by the reward's name.
        file: JSON, {reward: {digest: {image: score}}}; created if it does not exist.
        device: device of the rewards.

    Returns:
        The scores {reward: {image: score}}.

    Raises:
        RunFailed: a score differs, or a new score is not finite.
        ValueError: the file has another format; names it.
    """
    found: dict[str, dict[str, float]] = {}
    own: list[Metric] = []
    for reward in rewards:
        shipped = verify_shipped(reward, device)
        found[reward.name] = scores(reward, device) if shipped is None else shipped
        if shipped is None:
            own.append(reward.metric)
    if _new(own, digests, found, _read(file)):
        with locks.held(file.with_name(f".{file.name}.lock"), waiting=lambda _: None):
            known = _read(file)  # another process may have stored some meanwhile
            new = _new(own, digests, found, known)
            for name, added in new.items():
                known.setdefault(name, {}).setdefault(digests[name], {}).update(added)
            files.atomic_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
        for name, added in new.items():
            what = "its weights" if len(added) == len(PROMPTS) else ", ".join(map(repr, added))
            print(f"reward {name}: stored the golden scores of {what} in {file}", flush=True)
    return found


def _new(
    checked: Sequence[Metric],
    digests: Mapping[str, str],
    found: Mapping[str, Mapping[str, float]],
    known: Stored,
) -> dict[str, dict[str, float]]:
    """The scores {reward: {image: score}} that are not stored; those that are, are checked.

    Raises:
        RunFailed: a score differs, or a new one is not finite.
    """
    new = {}
    for metric in checked:
        name = metric.name
        stored = known.get(name, {}).get(digests[name], {})
        check(metric, found[name], stored)
        added = {image: score for image, score in found[name].items() if image not in stored}
        for image, score in added.items():
            if not math.isfinite(score):
                raise errors.RunFailed(f"reward {name}: the golden image {image!r} scores {score}")
        if added:
            new[name] = added
    return new


def stored(file: Path, digests: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The stored scores {reward: {image: score}} of rewards with the given weights' SHA-256.

    Raises:
        ValueError: the file has another format; names it.
    """
    known = _read(file)
    return {name: known.get(name, {}).get(digest, {}) for name, digest in digests.items()}


# What rewards have scored in this process, by name, version and device.
_verified: dict[tuple[str, str, str], dict[str, float]] = {}


def verify_shipped(reward: Reward, device: torch.device | str = "cpu") -> dict[str, float] | None:
    """Compare a reward with its shipped golden scores, once per process.

    Returns:
        Its scores by image; None if no scores of its version are shipped.

    Raises:
        RunFailed: a score differs.
    """
    metric = reward.metric
    expected = _shipped().get(metric.name, {}).get(metric.version)
    if expected is None:
        return None
    key = (metric.name, metric.version, str(device))
    if key not in _verified:
        found = scores(reward, device)
        check(metric, found, expected)
        _verified[key] = found
    return _verified[key]


@cache
def _shipped() -> Stored:
    return _read(SHIPPED)


def ship(rewards: Sequence[Reward]) -> None:
    """Replace the shipped golden scores by those that the rewards give on this machine."""
    found: Stored = {}
    for reward in rewards:
        found.setdefault(reward.name, {})[reward.metric.version] = scores(reward)
    files.atomic_text(SHIPPED, json.dumps(found, indent=1, sort_keys=True) + "\n")


def _read(file: Path) -> Stored:
    """The stored scores; empty if there is no file."""
    if not file.exists():
        return {}
    try:
        return TypeAdapter(Stored).validate_json(file.read_bytes())
    except ValidationError:
        raise ValueError(
            f"{file}: does not hold golden scores; delete it to store them again"
        ) from None
