"""Scores of image files with one metric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from tafs.assets.sources import AssetSource
from tafs.common.errors import one_line
from tafs.common.yaml_files import ConfigError, suggestion
from tafs.data import prompts
from tafs.data.prompts import Prompt, quoted
from tafs.evaluation import served
from tafs.evaluation.evaluate import verified_rewards
from tafs.rewards import golden, statistics
from tafs.rewards.metrics import METRICS, Reward
from tafs.rewards.registry import check_images
from tafs.runtime import progress
from tafs.shapes.scenes import IMAGE_SIZE

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 64  # images of one size that are scored at once


# The metric of sets of images that `diversity` computes; it is not in METRICS.
VENDI = "vendi"


class Diversity(NamedTuple):
    """The Vendi score of the images of a prompt, or of all images."""

    prompt: str | None  # None: all images
    images: int
    value: float


class ImageScore(NamedTuple):
    """The score of an image, on the metric's published scale; NaN: a missing value."""

    file: Path
    prompt: Prompt
    value: float


def score_images(
    metric: str, images: Path, prompt_file: Path, source: AssetSource
) -> list[ImageScore]:
    """Score the images of a folder with one metric, as evaluations do.

    Args:
        metric: a name of METRICS; GenEval gives its strict verdict, 0 or 1.
        images: a folder of .png, .jpg and .webp files, also in folders below.
        prompt_file: see `paired`.
        source: where the metric's model comes from, `tafs.assets.sources.of(...)`.

    Returns:
        One score per image, in the order of the prompts.

    Raises:
        ValueError, FileNotFoundError: wrong input; one line that names it.
        RunFailed: the metric does not reproduce its golden scores, or its server fails.
    """
    if metric not in METRICS:
        known = [*METRICS, VENDI]
        raise ConfigError(f"--metric: unknown metric {metric!r}{suggestion(metric, known)}")
    pairs = paired(images, prompt_file)
    if key := METRICS[metric].metadata:
        bare = next((prompt for _, prompt in pairs if not prompt.row.get(key)), None)
        if bare is not None:
            raise ConfigError(
                f"{prompt_file}: {bare.text!r} has no {key!r}, which {metric} needs; give JSON "
                "Lines with GenEval's metadata"
            )
    if METRICS[metric].quotes:
        bare = next((prompt for _, prompt in pairs if not quoted(prompt.text)), None)
        if bare is not None:
            raise ConfigError(
                f"{prompt_file}: {bare.text!r} has no text in double quotes, which {metric} needs; "
                "quote what the image should say"
            )
    with ExitStack() as stack:
        if METRICS[metric].served and source.settings.assets == "hub":
            log = Path(f"{metric}-server.log")
            client = stack.enter_context(served.client(metric, source, len(pairs), log))
            reward = client.reward()
            if source.golden_scores is not None:
                digests = {metric: source.reward_digest(metric)}
                golden.record([reward], digests, source.golden_scores)
        else:
            [reward] = verified_rewards(source, [metric]).rewards
        return list(_scores(reward, pairs, source))


def diversity(images: Path, prompt_file: Path, source: AssetSource) -> list[Diversity]:
    """The Vendi scores of a folder's images: of all, then of each prompt that has several.

    The features are the image embeddings of the source's CLIP.

    Args:
        images: as for `score_images`.
        prompt_file: see `paired`.

    Raises:
        ValueError, FileNotFoundError: wrong input; one line that names it.
        RunFailed: CLIP does not reproduce its golden scores.
    """
    pairs = paired(images, prompt_file)
    clip: Any = verified_rewards(source, ["clip"]).rewards[0].scorer
    parts, done = [], 0
    with torch.no_grad():
        for files, batch in _batches([file for file, _ in pairs]):
            try:
                batch = check_images(VENDI, batch, [prompt for _, prompt in pairs[: len(files)]])
                parts.append(clip.embed(batch.to(source.device)).double().cpu())
            except ValueError as error:
                raise ValueError(f"{files[0]}: {error}{_remedy(batch, source)}") from None
            done += len(files)
            progress.tell("Vendi score", done, len(pairs))
    features = torch.cat(parts).numpy()
    members: dict[str, list[int]] = {}
    for row, (_, prompt) in enumerate(pairs):
        members.setdefault(prompt.text, []).append(row)
    groups = {text: rows for text, rows in members.items() if len(rows) > 1}
    return [
        Diversity(text, len(rows), statistics.vendi_score(features[rows]))
        for text, rows in [(None, list(range(len(pairs)))), *groups.items()]
    ]


def paired(images: Path, prompt_file: Path) -> list[tuple[Path, Prompt]]:
    """Each image with its prompt.

    Args:
        images: a folder of images.
        prompt_file: .txt with a prompt per line, or .jsonl with an object per line: `prompt` (or
            `text`), GenEval's fields where it judges, and `file_name`. Without `file_name`, images
            in the natural order of their names (2.png before 10.png) belong to the lines in order.

    Raises:
        ConfigError, FileNotFoundError: the files do not fit; one line that says why.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: is not a folder; give the folder of the images")
    inside = {
        file.relative_to(images).as_posix(): file
        for file in images.rglob("*")
        if file.suffix.lower() in ENDINGS
    }
    known = read_prompts(prompt_file)
    named = [str(prompt.row["file_name"]) for prompt in known if "file_name" in prompt.row]
    if not named:
        order = sorted(inside, key=_natural)
    elif len(named) < len(known):
        raise ConfigError(
            f"{prompt_file}: {len(known) - len(named)} of {len(known)} lines have no 'file_name'; "
            "give it to all lines or to none"
        )
    else:
        order = named
        missing = next((name for name in named if name not in inside), None)
        if missing is not None:
            raise ConfigError(f"{prompt_file}: {missing!r} is not an image in {images}")
    if not len(inside) == len(known) == len(set(order)):
        raise ConfigError(
            f"{images}: has {len(inside)} images, but {prompt_file} has {len(known)} prompts"
            f"{f' for {len(set(named))} of them' if named else ''}; give one prompt for every image"
        )
    return [(inside[name], prompt) for name, prompt in zip(order, known, strict=True)]


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a .txt file with one per line, or of a .jsonl file; see `paired`.

    Raises:
        ConfigError, FileNotFoundError, ValueError: it is not such a file; names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; give a .txt or .jsonl file of prompts")
    if file.suffix == ".txt":
        return prompts.read_lines(file)
    if file.suffix == ".jsonl":
        return prompts.read(file, keys=("prompt", "text"))
    raise ConfigError(f"{file}: is not a .txt or .jsonl file of prompts")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their values."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _scores(
    reward: Reward, pairs: Sequence[tuple[Path, Prompt]], source: AssetSource
) -> Iterator[ImageScore]:
    done, total = 0, len(pairs)
    for files, images in _batches([file for file, _ in pairs]):
        part = pairs[done : done + len(files)]
        try:
            with torch.no_grad():
                found = reward.score(images.to(source.device), [prompt for _, prompt in part])
        except ValueError as error:
            raise ValueError(f"{files[0]}: {error}{_remedy(images, source)}") from None
        for (file, prompt), value in zip(part, reward.report(found).tolist(), strict=True):
            yield ImageScore(file, prompt, value)
        done += len(files)
        progress.tell(reward.metric.title, done, total)


def _remedy(images: torch.Tensor, source: AssetSource) -> str:
    """What a refusal of images [B, 3, H, W] adds if the embedded models are too small for them."""
    if source.settings.assets != "shapes" or images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return ""
    return (
        "; these are the embedded models, give --scale one-gpu or paper to score images of any "
        "size with the published ones"
    )


def _batches(files: Sequence[Path]) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Consecutive images of equal size, [b, 3, H, W] in [0, 1], with their files."""
    held: list[tuple[Path, np.ndarray]] = []
    for file in files:
        pixels = _pixels(file)
        if held and (len(held) == BATCH or held[0][1].shape != pixels.shape):
            yield _stacked(held)
            held = []
        held.append((file, pixels))
    if held:
        yield _stacked(held)


def _stacked(held: Sequence[tuple[Path, np.ndarray]]) -> tuple[list[Path], torch.Tensor]:
    stacked = torch.from_numpy(np.stack([pixels for _, pixels in held]))
    return [file for file, _ in held], stacked.permute(0, 3, 1, 2).float() / 255


def _pixels(file: Path) -> np.ndarray:
    """An image [H, W, 3], uint8; transparent parts are white."""
    try:
        with Image.open(file) as image:
            if not image.has_transparency_data:
                return np.array(image.convert("RGB"))
            ground = Image.new("RGBA", image.size, "white")
            return np.array(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: is not a readable image ({one_line(str(error))})") from None
