"""Prompt embeddings on disk, shared by all runs that encode the same prompts in the same way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tafs.common import files
from tafs.models.conditioning import Conditioning

LIMIT = 32 << 30  # bytes of a folder, after which further prompts are not stored


class Embeddings:
    """A folder with a file for each prompt, named by the prompt's SHA-256.

    Args:
        folder: for one model, precision, length of prompts and kind of device; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes: int | None = None  # of the folder, once something has been stored

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def read(self, prompt: str) -> Conditioning | None:
        """The conditioning of a prompt, a batch of one; None if it is not stored, or damaged.

        A damaged file is named in one printed line.

        Raises:
            OSError: the file cannot be read; names it.
        """
        file = self._file(prompt)
        try:
            files.check_readable(file)
            found = load_file(file)
            return Conditioning(found["embeds"], found["pooled"], mask=found.get("mask"))
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError):
            print(f"{file}: is damaged; the prompt is encoded again", flush=True)
            return None

    def write(self, prompt: str, one: Conditioning) -> None:
        """Store the conditioning of a prompt, unless the folder is full.

        Raises:
            OSError: the file cannot be written; names it.
        """
        if self._bytes is None:
            self._bytes = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        if self._bytes + one.nbytes > LIMIT:
            return
        tensors = {"embeds": one.embeds, "pooled": one.pooled}
        tensors |= {} if one.mask is None else {"mask": one.mask}
        with files.atomic(self._file(prompt), shared=True) as temporary:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
        self._bytes += one.nbytes
