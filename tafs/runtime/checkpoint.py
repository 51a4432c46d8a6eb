"""The resume state of a training run, and files that appear whole or not at all.

Snakemake deletes declared outputs before every attempt, so the state lives beside them in a folder
of its own (`<run>/.state/`). Layout, the highest number being the newest generation:

    <folder>/000007/tensors.safetensors
                    values.json      fingerprint, iteration and the caller's values
                    manifest.json    SHA-256 of both: safetensors loads a flipped bit silently

Two intact generations are kept. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tafs.common.errors import one_line
from tafs.common.files import _fsync, sha256

KEPT = 2


TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What `load` found; `notes` has a line for each newer state that could not be used."""

    iteration: int
    tensors: dict[str, Tensor]  # on the CPU
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def save(
    folder: Path,
    fingerprint: str,
    iteration: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Add a generation; a failure or a kill at any point leaves the earlier ones loadable.

    Args:
        tensors: on any device, of any dtype; `torch.get_rng_state()` is one too.
        values: JSON. Tuples come back as lists, keys as strings.

    Raises:
        OSError: the state could not be written (a full disk, say).
        TypeError: `values` holds what JSON does not know.
    """
    folder = Path(folder)
    # A clone, because safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content = {"fingerprint": fingerprint, "iteration": iteration, "values": dict(values)}
    files = {TENSORS: safetensors.torch.save(copies), VALUES: json.dumps(content).encode()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps({"sha256": hashes}, indent=1).encode()

    older = _generations(folder)
    final = folder / f"{int(older[0].name) + 1 if older else 0:06d}"
    incoming = folder / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        for name, data in files.items():
            (incoming / name).write_bytes(data)
            _fsync(incoming / name)
        _fsync(incoming)
        os.replace(incoming, final)
        _fsync(folder)
    except OSError:
        shutil.rmtree(incoming, ignore_errors=True)
        raise

    intact = 1
    for generation in older:
        if intact < KEPT and not _damage(generation):
            intact += 1
        else:
            shutil.rmtree(generation, ignore_errors=True)


def load(
    folder: Path, fingerprint: str, lacks: Callable[[State], str] = lambda _: ""
) -> State | None:
    """The newest intact state with this fingerprint, or None.

    A state that is damaged, belongs to another fingerprint or lacks something is passed over with a
    line in the log and in `State.notes`; it stays on the disk until `save` or `clear` removes it.

    Args:
        lacks: what a state refers to that is not there, in words; "" if nothing.
    """
    notes: list[str] = []
    for generation in _generations(Path(folder)):
        reason = _damage(generation)
        if not reason:
            try:
                content = json.loads((generation / VALUES).read_bytes())
                if content["fingerprint"] == fingerprint:
                    # From bytes: a mapped file cannot be deleted cleanly on a network file system.
                    tensors = safetensors.torch.load((generation / TENSORS).read_bytes())
                    state = State(content["iteration"], tensors, content["values"], notes)
                    reason = lacks(state)
                    if not reason:
                        return state
                else:
                    found = content["fingerprint"]
                    reason = f"its fingerprint is {found}, the run's is {fingerprint}"
            except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                reason = f"it is no state ({one_line(str(error))})"  # whoever wrote its manifest
        notes.append(f"ignored the resume state {generation}: {reason}")
        logger.warning(notes[-1])
    return None


def clear(folder: Path) -> None:
    """Remove the resume state; no error if there is none."""
    if Path(folder).exists():
        shutil.rmtree(folder)


def pack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as copied tensors `<prefix>/<parameter>/<name>` and JSON `<prefix>`.

    Both are flat enough to be merged with others' and given to `save`.
    """
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        state[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/{index}/{name}"] = value.detach().to("cpu", copy=True)
            else:
                state[str(index)][name] = value
    return tensors, {prefix: {"state": state, "param_groups": packed["param_groups"]}}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    prefix: str = "optimizer",
) -> None:
    """Give an optimizer over the same parameters the state that `pack_optimizer` took, bit for bit.

    Entries of `tensors` and `values` that other prefixes own are left alone.

    Raises:
        KeyError: there is no state of this prefix.
        ValueError: the parameter groups differ.
    """
    packed = values[prefix]
    state = {int(index): dict(entries) for index, entries in packed["state"].items()}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}/"):
            index, name = key.removeprefix(f"{prefix}/").split("/")
            state[int(index)][name] = tensor.clone()
    groups = [
        {
            # JSON made lists of the tuples (betas).
            key: tuple(item) if isinstance(item, list) and key != "params" else item
            for key, item in group.items()
        }
        for group in packed["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _generations(folder: Path) -> list[Path]:
    """The generations in a folder, newest first."""
    found = [path for path in folder.glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _damage(generation: Path) -> str:
    """What is wrong with a generation's files, in a few words; empty if they are as written.

    Raises:
        OSError: they cannot be read.
    """
    try:
        hashes = json.loads((generation / MANIFEST).read_bytes())["sha256"]
        for name in (TENSORS, VALUES):
            if sha256(generation / name) != hashes[name]:
                return f"{name} is damaged"
    # Another error does not say that the files are damaged: whoever begins anew would remove them.
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename or generation).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return ""
