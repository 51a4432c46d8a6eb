"""The resume state of a training or of an evaluation's setting, in a folder of its own.

Layout, where the highest number is the newest generation:

    <folder>/000007/tensors.safetensors
                    values.json      needs, iteration and the caller's values
                    manifest.json    SHA-256 of both; safetensors loads a flipped bit silently

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
from tafs.common.files import check_readable, fsync, sha256
from tafs.runtime import receipts
from tafs.runtime.receipts import Needs

KEPT = 2  # intact generations
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """A loaded resume state; `notes` has one line per newer state that could not be used."""

    iteration: int
    tensors: dict[str, Tensor]  # on the CPU
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def save(
    folder: Path,
    needs: Needs,
    iteration: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Add a generation. A failure or a kill at any point leaves the earlier ones loadable.

    Args:
        folder: of the resume state; it is created.
        needs: what the run's outcome depends on.
        iteration: the number of finished iterations.
        tensors: of any device and dtype.
        values: JSON. Tuples are loaded as lists and keys as strings.

    Raises:
        OSError: the state could not be written.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content = {"needs": dict(needs), "iteration": iteration, "values": dict(values)}
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
            fsync(incoming / name)
        fsync(incoming)
        os.replace(incoming, final)
        fsync(folder)
    except OSError:
        shutil.rmtree(incoming, ignore_errors=True)
        raise

    intact = 1
    for generation in older:
        if intact < KEPT and not _damage(generation):
            intact += 1
        else:
            shutil.rmtree(generation, ignore_errors=True)


def load(folder: Path, needs: Needs, lacks: Callable[[State], str] = lambda _: "") -> State | None:
    """Return the newest intact state with these needs, or None.

    Any other state is skipped with one line in the log and in `State.notes`. It stays on the disk
    until `save` or `clear` removes it.

    Args:
        folder: of the resume state.
        needs: of the run.
        lacks: returns what a state refers to but is missing, in words, or "".
    """
    notes: list[str] = []
    for generation in _generations(folder):
        reason = _damage(generation)
        if not reason:
            try:
                content = json.loads((generation / VALUES).read_bytes())
                # From bytes: a mapped file cannot be deleted cleanly on a network file system.
                tensors = safetensors.torch.load((generation / TENSORS).read_bytes())
                state = State(content["iteration"], tensors, content["values"], notes)
                if different := receipts.differences(content["needs"], needs):
                    reason = f"it is of other settings ({'; '.join(different)})"
                elif not (reason := lacks(state)):
                    return state
            except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                reason = f"it is not a resume state ({one_line(str(error))})"
        notes.append(f"ignored the resume state {generation}: {reason}")
        logger.warning(notes[-1])
    return None


def clear(folder: Path) -> None:
    """Remove the resume state, if there is one."""
    if folder.exists():
        shutil.rmtree(folder)


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy an optimizer's state to tensors and JSON, which can be merged with others for `save`."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        state[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().to("cpu", copy=True)
            else:
                state[str(index)][name] = value
    return tensors, {"optimizer": {"state": state, "param_groups": packed["param_groups"]}}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` copied, bit for bit; other entries are ignored.

    Raises:
        ValueError: the parameter groups differ.
    """
    packed = values["optimizer"]
    state = {int(index): dict(entries) for index, entries in packed["state"].items()}
    for key, tensor in tensors.items():
        kind, _, place = key.partition("/")
        if kind == "optimizer":
            index, name = place.split("/")
            state[int(index)][name] = tensor.clone()
    groups = [
        {
            # JSON turns tuples (betas) into lists.
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
    """Describe the damage to a generation's files; "" if they are as written."""
    try:
        check_readable(generation / MANIFEST)
        hashes = json.loads((generation / MANIFEST).read_bytes())["sha256"]
        for name in (TENSORS, VALUES):
            if sha256(generation / name) != hashes[name]:
                return f"{name} is damaged"
    # Any other OSError does not mean damage: starting over would delete a usable state.
    except (FileNotFoundError, NotADirectoryError) as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return ""
