"""Golden scores: stored scores of fixed images, which detect changes of a reward model's output.

`python -m tafs.evaluation.check_rewards RUN_DIR OUT` scores the images with every reward of the
run's asset source. The first scores of a reward's weights are stored beside the lock file; keep
both under version control. Later, this command and every evaluation compare with them and fail if
a library, driver or precision changes a score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from tafs.common import errors, files
from tafs.data.prompts import Prompt
from tafs.rewards.metrics import Reward

SIDE = 224  # pixels
TOLERANCE = 1e-3  # relative to the stored score
NEAR_ZERO = 1e-4  # absolute, in units of the training score
SERVED_TOLERANCE = 0.1  # half a grade: a server's output depends on how requests are batched

Stored = dict[str, dict[str, dict[str, float]]]  # by reward, digest of the weights, and image

# Captions with GenEval's metadata and COCO's classes, and with a question as GenEval 2 has them,
# which every reward can score.
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
    )
}


def images() -> dict[str, np.ndarray]:
    """The images [SIDE, SIDE, 3], uint8, by name in the order of PROMPTS."""
    y, x = np.mgrid[:SIDE, :SIDE]

    def disc(column: int, radius: int) -> np.ndarray:
        return ((x - column) ** 2 + (y - SIDE // 2) ** 2 < radius**2)[..., None]

    white = np.full((SIDE, SIDE, 3), 255)
    two = np.where(disc(60, 40), (20, 160, 50), white)
    rings = ((x - SIDE // 2) ** 2 + (y - SIDE // 2) ** 2) // 32 % 256
    drawn = {
        "gradient": np.stack([255 - x, (x + y) // 2, x], axis=-1),
        "disc": np.where(disc(SIDE // 2, 70), (220, 30, 30), white),
        "two discs": np.where(disc(164, 40), (30, 60, 230), two),
        "rings": np.stack([rings, 255 - rings, y], axis=-1),
    }
    return {name: image.astype(np.uint8) for name, image in drawn.items()}


def scores(reward: Reward, device: torch.device | str = "cpu") -> list[float]:
    """Training-scale scores of the images, in the order of PROMPTS."""
    pixels = torch.from_numpy(np.stack(list(images().values()))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = reward.score(pixels.to(device), list(PROMPTS.values()))
    return [float(score) for score in found]


def check(
    name: str, scores: Sequence[float], stored: Mapping[str, float], tolerance: float = NEAR_ZERO
) -> None:
    """Compare a reward's scores, in the order of PROMPTS, with the stored ones by image.

    Raises:
        RunFailed: a score differs by more than `tolerance` and by more than the relative TOLERANCE,
            or none is stored; names reward, image and scores.
    """
    for image, found in zip(PROMPTS, scores, strict=True):
        expected = stored.get(image, math.nan)
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=tolerance):
            raise errors.RunFailed(
                f"reward {name}: the golden image {image!r} scores {found:.6g} instead of "
                f"{expected:.6g}; restore the library, driver or precision that it was stored with"
            )


def record(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
    *,
    store: bool = True,
) -> dict[str, dict[str, float]]:
    """Check rewards whose golden scores are stored, and store those of the others.

    Args:
        rewards: the rewards, on `device`.
        digests: SHA-256 of each reward's weights, by the reward's name.
        file: JSON, {reward: {digest: {image: score}}}; created if it does not exist.
        device: device of the rewards.
        store: whether scores may be added; those of optional metrics are added in any case, because
            nothing before their first use may have asked for them.

    Returns:
        The scores {reward: {image: score}}.

    Raises:
        RunFailed: a score differs, a new score is not finite, or none is stored for a reward's
            weights and `store` is off.
        ValueError: the file has another format; names it.
    """
    known = _read(file)
    found: dict[str, dict[str, float]] = {}
    added = False
    for reward in rewards:
        name, digest = reward.name, digests[reward.name]
        of_reward = known.setdefault(name, {})
        if digest not in of_reward and not (store or reward.metric.optional):
            raise errors.RunFailed(
                f"reward {name}: {file} has no golden scores of its weights; run the workflow's "
                "rule check_rewards first"
            )
        found[name] = dict(zip(PROMPTS, scores(reward, device), strict=True))
        if digest in of_reward:
            tolerance = SERVED_TOLERANCE if reward.metric.served else NEAR_ZERO
            check(name, list(found[name].values()), of_reward[digest], tolerance)
            continue
        for image, score in found[name].items():
            if not math.isfinite(score):
                raise errors.RunFailed(f"reward {name}: the golden image {image!r} scores {score}")
        added = True
        of_reward[digest] = found[name]
    if added:
        files.atomic_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


verify = partial(record, store=False)


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
