"""Fixed images and captions whose scores tell whether a reward model is still the one it was.

`python -m tafs.evaluation.check_rewards RUN_DIR OUT` scores them with every reward of the run's world. The
first scores of given weights are stored beside the lock file (keep them as the lock is kept); from
then on a library, driver or precision that scores differently is found before a run is judged by
it: this command fails, and every evaluation checks its own rewards again.
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

SIDE = 224


TOLERANCE = 1e-3  # of the stored score


NEAR_ZERO = 1e-4  # where a score lies about zero, so much in its own unit


SERVED_TOLERANCE = 0.1  # half a grade: a server's batches decide where a sampled text goes


# Captions with GenEval's metadata, of COCO's classes, so that every reward can score them.
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
    """The images by name, in the order of PROMPTS; [SIDE, SIDE, 3] uint8 each."""
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
    """The reward's scores of the images, in the order of PROMPTS, on the training scale."""
    pixels = torch.from_numpy(np.stack(list(images().values()))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = reward.score(pixels.to(device), list(PROMPTS.values()))
    return [float(score) for score in found]


def check(
    name: str, scores: Sequence[float], stored: Mapping[str, float], tolerance: float = NEAR_ZERO
) -> None:
    """Compare a reward's scores with those that are stored for its weights, by image.

    Args:
        tolerance: in the score's own unit; TOLERANCE of the stored score is allowed in any case.

    Raises:
        RunFailed: a score differs by more or has none stored; names reward, image, expected and
            found.
    """
    for image, found in zip(PROMPTS, scores, strict=True):
        expected = stored.get(image, math.nan)
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=tolerance):
            raise errors.RunFailed(
                f"reward {name} scores the golden image {image!r} {found:.6g}, stored is "
                f"{expected:.6g}: its model does not compute what it did"
            )


def verify(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
) -> None:
    """Check the rewards by the scores that `file` has for their weights.

    Args:
        digests: of each reward's weights, by the reward's name.
        file: JSON, {reward: {digest: {image: score}}}.

    Raises:
        RunFailed: as `check`, or nothing is stored for a reward's weights.
        ValueError: the file is not JSON of that form; names it.
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
    """Check the rewards whose weights `file` knows, add the others to it, return all their scores.

    Args:
        digests, file: as of `verify`; the file need not be there.

    Raises:
        RunFailed: as `check`, and where a new score is not finite.
        ValueError: the file is not JSON of that form; names it.
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
                raise errors.RunFailed(f"reward {name} scores the golden image {image!r} {score}")
        added = True
        of_reward[digest] = found[name]
    if added:
        files.atomic_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def _tolerance(reward: Reward) -> float:
    return SERVED_TOLERANCE if reward.served else NEAR_ZERO


def _read(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The stored scores; none where there is no file."""
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
        raise ValueError(f"{file}: holds no golden scores; delete it to have them anew") from None
