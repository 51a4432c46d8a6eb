"""Fixed images and captions whose scores tell whether a reward model is still the one it was.

The first scores of given weights are stored; from then on a library, driver or precision that
scores differently is found before a run is judged by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tafs import checkpoint, rundir
from tafs.prompts import Prompt
from tafs.rewards.registry import Reward

SIDE = 224
TOLERANCE = 1e-3  # of the stored score
NEAR_ZERO = 1e-4  # where a score lies about zero, so much in its own unit

PROMPTS = {
    "gradient": Prompt(
        "a smooth gradient from red to blue",
        {"tag": "colors", "include": [{"class": "gradient", "count": 1, "color": "blue"}]},
    ),
    "disc": Prompt(
        "a photo of a red circle",
        {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]},
    ),
    "two discs": Prompt(
        "a photo of a green circle left of a blue circle",
        {
            "tag": "position",
            "include": [
                {"class": "circle", "count": 1, "color": "blue"},
                {"class": "circle", "count": 1, "color": "green", "position": ["left of", 0]},
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


def check(name: str, scores: Sequence[float], stored: Mapping[str, float]) -> None:
    """Compare a reward's scores with those that are stored for its weights, by image.

    Raises:
        RunFailed: a score differs by more than TOLERANCE of the stored one (NEAR_ZERO about zero)
            or has none stored; names reward, image, expected and found.
    """
    for image, found in zip(PROMPTS, scores, strict=True):
        expected = stored.get(image, math.nan)
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=NEAR_ZERO):
            raise rundir.RunFailed(
                f"reward {name} scores the canary image {image!r} {found:.6g}, stored is "
                f"{expected:.6g}: its model does not compute what it did"
            )


def verify(
    rewards: Sequence[Reward],
    digests: Mapping[str, str],
    file: Path,
    device: torch.device | str = "cpu",
) -> None:
    """Check the rewards whose weights `file` knows, and add the others to it.

    Of two processes that add to the file at once one may be lost: its weights are added next time.

    Args:
        digests: of each reward's weights, by the reward's name.
        file: JSON, {reward: {digest: {image: score}}}; it need not be there.

    Raises:
        RunFailed: as `check`, and where a new score is not finite.
        ValueError: the file is not JSON of that form; names it.
    """
    known = _read(file)
    added = False
    for reward in rewards:
        name, digest = reward.name, digests[reward.name]
        found = scores(reward, device)
        of_reward = known.setdefault(name, {})
        if digest in of_reward:
            check(name, found, of_reward[digest])
            continue
        added = True
        of_reward[digest] = dict(zip(PROMPTS, found, strict=True))
        for image, score in of_reward[digest].items():
            if not math.isfinite(score):
                raise rundir.RunFailed(f"reward {name} scores the canary image {image!r} {score}")
    if added:
        checkpoint.atomic_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")


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
        raise ValueError(f"{file}: holds no canary scores; delete it to have them anew") from None
