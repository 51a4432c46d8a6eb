"""The host memory that a process of a job takes, from the sizes of the files that it loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tafs.assets import lockfile
from tafs.common.yaml_files import ConfigError
from tafs.models.base import KEPT_BYTES

GB, MB = 1e9, 1e6  # Snakemake's mem_mb; Slurm takes its number as MiB, which is 5 % more
# Libraries and CUDA's context; at the embedded scales also models and rewards, where a job took
# 0.74 GiB on a CPU (docs/hardware.md). On GPUs it is an assumption.
LIBRARIES = 3000 * MB
# A server's processes with libraries of their own: requests, tokens, model and texts.
SERVER_PROCESSES = 4


class Sizes:
    """The sizes of resources: a lock file's where it pins them, otherwise those of resources.yaml.

    Raises:
        ConfigError, ValueError: one of the files is damaged; one line that names it.
    """

    def __init__(self, lock: Path) -> None:
        locked = lockfile.read_lock(lock) if lock.is_file() else {}
        self._bytes = {name: one.gigabytes * GB for name, one in lockfile.read().items()}
        self._bytes |= {name: float(entry.size) for name, entry in locked.items()}

    def of(self, names: Iterable[str]) -> float:
        """Bytes of some resources; a ConfigError names one that is unknown."""
        total = 0.0
        for name in names:
            if name not in self._bytes:
                raise ConfigError(f"{name}: its size is unknown; add it to {lockfile.RESOURCES}")
            total += self._bytes[name]
        return total


def of_process(
    files: float, *, widened: float = 0.0, keeps_embeddings: bool = False, serves: bool = False
) -> int:
    """MB of host memory that a process takes at most.

    Args:
        files: bytes of all files that it loads. Those of a model count whole: on a small GPU the
            network waits in host memory for the text encoders, which afterwards stay there, and a
            model that is only compared is loaded there before it moves. Those of rewards do as
            well, although each moves to the GPU before the next one is loaded. Weights that are
            used in the precision of their file stay mapped to it: the system can drop them, and
            the processes of a node share them, but a cluster may count them for each.
        widened: bytes by which weights are larger in memory than in their files.
        keeps_embeddings: whether it keeps the embeddings of prompts, up to KEPT_BYTES.
        serves: whether it starts a server.
    """
    kept = KEPT_BYTES if keeps_embeddings else 0
    libraries = LIBRARIES * (1 + SERVER_PROCESSES * serves)
    return round((libraries + files + widened + kept) / MB)
