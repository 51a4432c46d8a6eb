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
from pathlib import Path

import numpy as np
import torch

from tafs.common import errors, files
from tafs.data.prompts import Prompt
from tafs.rewards.registry import Reward

SIDE = 224  # pixels
TOLERANCE = 1e-3  # relative to the stored score
NEAR_ZERO = 1e-4  # absolute, in units of the training score
SERVED_TOLERANCE = 0.1  # half a grade: a server's output depends on how requests are batched

# Captions with GenEval's metadata and COCO's classes, which every reward can score.
PROMPTS = {
    "gradient": Prompt(
        "a photo of a blue kite",
        {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "blue"}]},
    ),
    "disc": Prompt(
        "a photo of a red frisbee",
        {"tag": "colors", "include": [{"class": "frisbee", "count": 1, "color": "red"}]},
    ),
    "two discs": Prompt(
        "a photo of a green apple left of a blue sports ball",
        {
            "tag": "position",
            "include": [
                {"class": "sports ball", "count": 1, "color": "blue"},
                {"class": "apple", "count": 1, "color": "green", "position": ["left of", 0]},
            ],
        },
    ),
    "rings": Prompt(
        "a photo of a bench",
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    ),
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
    """Compare a reward's scores with the stored ones.

    Args:
        name: the reward.
        scores: in the order of PROMPTS.
        stored: expected scores by image.
        tolerance: absolute tolerance; the relative TOLERANCE always applies too.

    Raises:
        RunFailed: a score differs by more, or none is stored; names reward, image and scores.
    """
    for image, found in zip(PROMPTS, scores, strict=True):
        expected = stored.get(image, math.nan)
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=tolerance):
            raise errors.RunFailed(
                f"reward {name}: the golden image {image!r} scores {found:.6g} instead of "
                f"{expected:.6g}; restore the library, driver or precision that it was stored with"
            )


def verify(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
) -> None:
    """Check rewards against the golden scores of their weights.

    Args:
        rewards: the rewards to check.
        digests: SHA-256 of each reward's weights, by the reward's name.
        file: JSON, {reward: {digest: {image: score}}}.
        device: device of the rewards.

    Raises:
        RunFailed: a score differs, or none is stored for a reward's weights.
        ValueError: the file has another format; names it.
    """
    known = _read(file)
    for reward in rewards:
        stored = known.get(reward.name, {}).get(digests[reward.name])
        if stored is None:
            raise errors.RunFailed(
                f"reward {reward.name}: {file} has no golden scores of its weights; run the "
                "workflow's rule check_rewards first"
            )
        check(reward.name, scores(reward, device), stored, _tolerance(reward))


def record(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Check rewards whose golden scores are stored, and store those of the others.

    Args:
        rewards, digests, device: as for `verify`.
        file: as for `verify`; created if it does not exist.

    Returns:
        The scores {reward: {image: score}}.

    Raises:
        RunFailed: a score differs, or a new score is not finite.
        ValueError: the file has another format; names it.
    """
    known = _read(file)
    found: dict[str, dict[str, float]] = {}
    added = False
    for reward in rewards:
        name, digest = reward.name, digests[reward.name]
        found[name] = dict(zip(PROMPTS, scores(reward, device), strict=True))
        of_reward = known.setdefault(name, {})
        if digest in of_reward:
            check(name, list(found[name].values()), of_reward[digest], _tolerance(reward))
            continue
        for image, score in found[name].items():
            if not math.isfinite(score):
                raise errors.RunFailed(f"reward {name}: the golden image {image!r} scores {score}")
        added = True
        of_reward[digest] = found[name]
    if added:
        files.atomic_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def _tolerance(reward: Reward) -> float:
    return SERVED_TOLERANCE if reward.metric.served else NEAR_ZERO


def _read(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The stored scores; empty if there is no file."""
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: {
                digest: {image: float(score) for image, score in of.items()}
                for digest, of in digests.items()
            }
            for name, digests in known.items()
        }
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{file}: does not hold golden scores; delete it to store them again"
        ) from None
