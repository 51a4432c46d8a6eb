"""Generated images on disk, for rewards that judge them in another process: PNG files in a zip."""

from __future__ import annotations

import io
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
    """Which image of a run it is."""

    iteration: int
    sampler: str
    nfe: int
    prompt: int
    image: int

    @property
    def member(self) -> str:
        return "/".join(str(part) for part in self) + ".png"

    @classmethod
    def of(cls, member: str) -> Key:
        """Raises ValueError where the name is not one of `member`'s."""
        iteration, sampler, nfe, prompt, image = member.removesuffix(".png").split("/")
        return cls(int(iteration), sampler, int(nfe), int(prompt), int(image))


def pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3] on the CPU."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().contiguous()


class Archive:
    """An archive that is being written."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, key: Key, image: Tensor) -> None:
        """image: uint8 [H, W, 3]."""
        encoded = io.BytesIO()
        Image.fromarray(image.numpy()).save(encoded, "PNG", compress_level=1)
        # A date of its own would make equal images different archives.
        self._archive.writestr(zipfile.ZipInfo(key.member), encoded.getvalue())


@contextmanager
def writing(file: Path) -> Iterator[Archive]:
    """The file is there once the block has ended well, with all images in it."""
    # PNG is compressed already.
    with files.atomic(file) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        yield Archive(archive)


def join(archives: Sequence[Path], file: Path) -> None:
    """One archive of the images of several, in their order.

    Raises:
        OSError, zipfile.BadZipFile: one of them cannot be read, or the file not be written.
    """
    with files.atomic(file) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as joined:
        for archive in archives:
            with zipfile.ZipFile(archive) as part:
                for member in part.infolist():
                    joined.writestr(member, part.read(member))


def read(file: Path, batch: int) -> Iterator[tuple[list[Key], Tensor]]:
    """The images in batches, in the order in which they were written.

    Yields:
        (keys, images [b, 3, H, W] in [0, 1]).

    Raises:
        FileNotFoundError, ValueError: it is missing or no archive of images; names the file.
        OSError: it cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not found; `python -m tafs.evaluation.evaluate` writes it"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            for low in range(0, len(members), batch):
                part = members[low : low + batch]
                stacked = np.stack([_decoded(archive.read(member)) for member in part])
                tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
                yield [Key.of(member) for member in part], tensor
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; Pillow's errors have none
            raise
        raise ValueError(f"{file}: not an archive of images ({error})") from None


def _decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
