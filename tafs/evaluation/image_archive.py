"""Generated images in zips of PNG files, for rewards that score them in another process.

An evaluation writes an archive with each saved state. They stay where they are: a list of them
stands for all images, so that no image is on the disk twice.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tafs.common import files


class Key(NamedTuple):
    """Identifies an image of a run."""

    iteration: int
    sampler: str
    nfe: int
    prompt: int
    image: int

    @property
    def member(self) -> str:
        """The image's name in the archive."""
        return "/".join(str(part) for part in self) + ".png"

    @classmethod
    def of(cls, member: str) -> Key:
        """The key of a name that `member` gave; ValueError for any other name."""
        iteration, sampler, nfe, prompt, image = member.removesuffix(".png").split("/")
        return cls(int(iteration), sampler, int(nfe), int(prompt), int(image))


def pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3] on the CPU."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().contiguous()


def encode(image: Tensor) -> bytes:
    """A PNG file of an image, uint8 [H, W, 3]."""
    encoded = io.BytesIO()
    Image.fromarray(image.numpy()).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


class Archive(zipfile.ZipFile):
    """An archive of images."""

    def add(self, key: Key, encoded: bytes) -> None:
        """Add an image, a PNG file."""
        # ZipInfo has a fixed date, so that equal images give equal archives.
        self.writestr(zipfile.ZipInfo(key.member), encoded)


@contextmanager
def writing(file: Path) -> Iterator[Archive]:
    """Open an archive for writing; `file` appears when the block ends without an error."""
    # Not compressed, because PNG is.
    with files.atomic(file) as path, Archive(path, "w", zipfile.ZIP_STORED) as archive:
        yield archive


def write_list(file: Path, archives: Sequence[Path]) -> None:
    """List the archives, which are below the file's folder; it stands for all of their images."""
    names = [archive.relative_to(file.parent).as_posix() for archive in archives]
    files.atomic_text(file, json.dumps(names, indent=1) + "\n")


def read(file: Path, batch: int, first: int = 0) -> Iterator[tuple[list[Key], Tensor]]:
    """Read the images from number `first` on in batches, in the order in which they were written.

    Args:
        file: the list of their archives; see `write_list`.

    Yields:
        (keys, images [b, 3, H, W] in [0, 1]).

    Raises:
        FileNotFoundError, ValueError: the list or an archive is missing or damaged; names it.
    """
    images = _images(file, first)
    while part := list(itertools.islice(images, batch)):
        try:
            stacked = torch.from_numpy(np.stack([pixels for _, pixels in part]))
        except ValueError as error:
            raise _refused(file, file, "images of one size", error) from None
        yield [key for key, _ in part], stacked.permute(0, 3, 1, 2).float() / 255


def keys(file: Path) -> list[Key]:
    """The keys of all images, in the order in which they were written."""
    found: list[Key] = []
    for archive in _archives(file):
        with zipfile.ZipFile(archive) as content:
            found += map(Key.of, content.namelist())
    return found


def _archives(file: Path) -> list[Path]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not found; `python -m tafs.evaluation.evaluate` writes it"
        )
    try:
        return [file.parent / name for name in json.loads(file.read_bytes())]
    except (ValueError, TypeError) as error:
        raise _refused(file, file, "a list of archives", error) from None


def _images(file: Path, first: int) -> Iterator[tuple[Key, np.ndarray]]:
    """The images [H, W, 3], uint8, from number `first` on."""
    for path in _archives(file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not found; delete {file.name}, and the run is evaluated again"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
                for member in members[first:]:
                    image = Image.open(io.BytesIO(archive.read(member)))
                    yield Key.of(member), np.asarray(image.convert("RGB"))
                first = max(0, first - len(members))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # from the disk; Pillow's have no errno
                raise
            raise _refused(file, path, "an archive of images", error) from None


def _refused(file: Path, path: Path, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: not {what} ({error}); delete {file.name}, and the run is evaluated again"
    )
