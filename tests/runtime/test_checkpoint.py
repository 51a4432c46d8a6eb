"""A resume state is the one that was saved, bit for bit, or it is refused with a reason."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafs.common import files
from tafs.runtime import checkpoint

PRINT = "5f1c"
FILES = (checkpoint.TENSORS, checkpoint.VALUES, checkpoint.MANIFEST)


class Killed(BaseException):
    """As SIGKILL: no `except OSError` sees it."""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails with a real OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(folder: Path, iteration: int, fingerprint: str = PRINT) -> None:
    weight = torch.full((3, 4), float(iteration))
    checkpoint.save(folder, fingerprint, iteration, {"weight": weight}, {"seen": iteration * 10})


def load(folder: Path, fingerprint: str = PRINT) -> checkpoint.State:
    state = checkpoint.load(folder, fingerprint)
    assert state is not None
    assert torch.equal(state.tensors["weight"], torch.full((3, 4), float(state.iteration)))
    assert state.values == {"seen": state.iteration * 10}
    return state


def newest(folder: Path) -> Path:
    return max(path for path in folder.iterdir() if path.name.isdecimal())


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, NaN included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.contiguous().numpy(force=True).tobytes() == b.contiguous().numpy(force=True).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".state"


def test_a_state_comes_back_bit_for_bit(folder: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
        "random state": torch.get_rng_state(),
        "transposed": shared.T,
        "alias": shared,
        "part": shared[1:3, ::2],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    values = {"lr": 0.1 + 0.2, "big": 2**70, "text": "Zwölf", "nested": {"list": [1, None, True]}}
    checkpoint.save(folder, PRINT, 12, tensors, values)
    state = checkpoint.load(folder, PRINT)
    assert state is not None
    assert (state.iteration, state.values, state.notes) == (12, values, [])
    assert state.tensors.keys() == tensors.keys()
    assert all(identical(state.tensors[name], tensors[name]) for name in tensors)
    half = {"half": torch.randn(5).bfloat16()}
    checkpoint.save(folder, PRINT, 13, half, {})
    state = checkpoint.load(folder, PRINT)
    assert state is not None
    assert state.tensors["half"].dtype == torch.bfloat16
    assert torch.equal(state.tensors["half"], half["half"])


def test_a_random_state_continues_the_same_numbers(folder: Path) -> None:
    with torch.random.fork_rng():
        checkpoint.save(folder, PRINT, 0, {"random": torch.get_rng_state()}, {})
        expected = torch.randn(5)
        state = checkpoint.load(folder, PRINT)
        assert state is not None
        torch.set_rng_state(state.tensors["random"])
        assert torch.equal(torch.randn(5), expected)


def test_the_newest_of_two_kept_generations_is_loaded(folder: Path) -> None:
    assert checkpoint.load(folder, PRINT) is None
    for iteration in range(12):
        save(folder, iteration)
        state = load(folder)
        assert (state.iteration, state.notes) == (iteration, [])
    assert len(list(folder.iterdir())) == checkpoint.KEPT


def test_every_file_of_a_state_is_plain_safetensors_or_json(folder: Path) -> None:
    save(folder, 0)
    generation = newest(folder)
    assert sorted(path.name for path in generation.iterdir()) == sorted(FILES)
    assert json.loads((generation / checkpoint.MANIFEST).read_text())["sha256"].keys() == {
        checkpoint.TENSORS,
        checkpoint.VALUES,
    }


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def flip(place: float, bit: int) -> Callable[[bytes], bytes]:
        def damage(data: bytes) -> bytes:
            changed = bytearray(data)
            changed[int(place * (len(data) - 1))] ^= 1 << bit
            return bytes(changed)

        return damage

    def cut(place: float) -> Callable[[bytes], bytes]:
        return lambda data: data[: int(place * len(data))]

    kinds: dict[str, Callable[[bytes], bytes]] = {
        f"bit {bit} flipped at {place}": flip(place, bit)
        for place in (0.0, 0.3, 0.5, 0.95, 1.0)
        for bit in (0, 6)
    }
    kinds |= {f"cut at {place}": cut(place) for place in (0.0, 0.1, 0.5, 0.99)}
    return kinds


@pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.VALUES])
def test_damage_is_noticed_and_the_previous_state_used(
    folder: Path, name: str, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 1)
    save(folder, 2)
    file = newest(folder) / name
    file.write_bytes(damage(file.read_bytes()))
    state = load(folder)
    assert state.iteration == 1
    (note,) = state.notes
    assert f"{newest(folder)}: {name} is damaged" in note
    assert caplog.messages == [note]


@given(st.data())
@settings(max_examples=40)
def test_a_damaged_manifest_never_yields_a_wrong_state(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("state")
    save(folder, 1)
    save(folder, 2)
    file = newest(folder) / checkpoint.MANIFEST
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    # A flipped bit in the white space may leave the manifest's meaning as it was.
    state = load(folder)
    assert (state.iteration, len(state.notes)) in {(1, 1), (2, 0)}


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"sha256": []}', '{"sha256": {'])
def test_a_manifest_without_its_hashes_is_damage(folder: Path, content: str) -> None:
    save(folder, 1)
    save(folder, 2)
    (newest(folder) / checkpoint.MANIFEST).write_text(content)
    state = load(folder)
    assert state.iteration == 1
    assert "manifest.json is damaged" in state.notes[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed_and_the_previous_state_used(folder: Path, name: str) -> None:
    save(folder, 1)
    save(folder, 2)
    (newest(folder) / name).unlink()
    state = load(folder)
    assert state.iteration == 1
    assert f"{name}: No such file" in state.notes[0]


def test_two_damaged_states_are_none_at_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(folder, 1)
    save(folder, 2)
    for generation in list(folder.iterdir()):
        (generation / checkpoint.TENSORS).write_bytes(b"")
    assert checkpoint.load(folder, PRINT) is None
    assert len(caplog.messages) == 2


def test_a_damaged_state_never_displaces_an_intact_one(folder: Path) -> None:
    save(folder, 1)
    save(folder, 2)
    (newest(folder) / checkpoint.TENSORS).unlink()
    save(folder, 3)
    (newest(folder) / checkpoint.TENSORS).unlink()
    assert load(folder).iteration == 1


def test_a_state_of_another_fingerprint_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 1, "old")
    assert checkpoint.load(folder, "new") is None
    (message,) = caplog.messages
    assert "its fingerprint is old, the run's is new" in message


def test_a_new_fingerprint_starts_over_beside_the_old_state(folder: Path) -> None:
    save(folder, 7, "old")
    save(folder, 0, "new")
    assert load(folder, "new").iteration == 0
    old = load(folder, "old")
    assert (old.iteration, len(old.notes)) == (7, 1)
    save(folder, 1, "new")
    assert checkpoint.load(folder, "old") is None


def test_clear_removes_the_state(folder: Path) -> None:
    save(folder, 1)
    checkpoint.clear(folder)
    assert not folder.exists()
    checkpoint.clear(folder)


def count_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], stop: int) -> int:
    """Run `act`, killed before its step number `stop` (-1: never); how many steps it took."""
    taken = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            if taken == stop:
                raise Killed
            taken += 1
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name in ("mkdir", "replace", "fsync", "rmdir", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Path, "write_bytes", counted(Path.write_bytes))
        if stop < 0:
            act()
        else:
            with pytest.raises(Killed):
                act()
    return taken


def test_a_kill_at_any_step_of_saving_leaves_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str) -> Path:
        folder = tmp_path / name / ".state"
        save(folder, 1)
        save(folder, 2)
        return folder

    whole = prepared("whole")
    steps = count_steps(monkeypatch, lambda: save(whole, 3), stop=-1)
    assert steps > 10
    seen = set()
    for stop in range(steps):
        folder = prepared(str(stop))
        count_steps(monkeypatch, lambda folder=folder: save(folder, 3), stop)  # type: ignore[misc]
        state = load(folder)
        assert state.notes == []
        seen.add(state.iteration)
        save(folder, 4)
        assert load(folder).iteration == 4
        assert len(list(folder.iterdir())) == checkpoint.KEPT
    assert seen == {2, 3}


def test_a_full_disk_leaves_the_previous_state(folder: Path) -> None:
    save(folder, 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with largest_file(4096), pytest.raises(OSError):
        checkpoint.save(folder, PRINT, 2, {"weight": torch.zeros(10_000)}, {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert load(folder).notes == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_flush_or_rename_is_raised_and_leaves_the_previous_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(folder, 1)

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, failing, fail)
        save(folder, 2)
    state = load(folder)
    assert (state.iteration, state.notes) == (1, [])
    assert len(list(folder.iterdir())) == 1


def parameters(shapes: list[tuple[int, ...]], seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One update with gradients that depend on the weights, so that an error would grow."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn(weight.shape, generator=generator) + weight.detach().sin()
    optimizer.step()


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=2, max_size=4),
    before=st.integers(0, 3),
    lr=st.floats(1e-6, 0.1),
    decay=st.floats(0, 0.1),
    amsgrad=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_a_resumed_optimizer_continues_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    before: int,
    lr: float,
    decay: float,
    amsgrad: bool,
    seed: int,
) -> None:
    def build(weights: list[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = [
            {"params": weights[:1]},
            {"params": weights[1:], "lr": lr / 2},
        ]
        return torch.optim.AdamW(
            groups, lr=lr, betas=(0.85, 0.97), weight_decay=decay, amsgrad=amsgrad
        )

    folder = tmp_path_factory.mktemp("state")
    weights = parameters(shapes, seed)
    optimizer = build(weights, lr)
    for index in range(before):
        step(optimizer, index)
    tensors, values = checkpoint.pack_optimizer(optimizer)
    tensors |= {f"weights/{i}": weight for i, weight in enumerate(weights)}
    checkpoint.save(folder, PRINT, before, tensors, {"other": 1, **values})

    state = checkpoint.load(folder, PRINT)
    assert state is not None
    resumed = parameters(shapes, seed + 1)
    # Its own learning rate is overwritten by the state's.
    other = build(resumed, lr * 3)
    checkpoint.unpack_optimizer(other, state.tensors, state.values)
    with torch.no_grad():
        for i, weight in enumerate(resumed):
            weight.copy_(state.tensors[f"weights/{i}"])
    for index in range(before, before + 3):
        step(optimizer, index)
        step(other, index)
    assert all(identical(a, b) for a, b in zip(weights, resumed, strict=True))
    expected, expected_values = checkpoint.pack_optimizer(optimizer)
    found, found_values = checkpoint.pack_optimizer(other)
    assert found_values == expected_values
    assert found.keys() == expected.keys()
    assert all(identical(found[key], expected[key]) for key in expected)


def test_a_packed_optimizer_is_a_copy_and_can_be_unpacked_twice() -> None:
    weights = parameters([(3, 2)], 0)
    optimizer = torch.optim.AdamW(weights)
    step(optimizer, 0)
    packed = checkpoint.pack_optimizer(optimizer, "policy/optimizer")
    kept = {key: tensor.clone() for key, tensor in packed[0].items()}
    assert set(kept) == {f"policy/optimizer/0/{n}" for n in ("step", "exp_avg", "exp_avg_sq")}
    for _ in range(2):
        step(optimizer, 1)
        assert all(identical(packed[0][key], kept[key]) for key in kept)
        checkpoint.unpack_optimizer(optimizer, *packed, prefix="policy/optimizer")


def test_the_state_of_another_optimizer_is_an_error() -> None:
    packed = checkpoint.pack_optimizer(torch.optim.AdamW(parameters([(2,), (3,)], 0)))
    other = torch.optim.AdamW(parameters([(2,)], 0))
    with pytest.raises(ValueError, match="parameter group"):
        checkpoint.unpack_optimizer(other, *packed)
    with pytest.raises(KeyError, match="ema"):
        checkpoint.unpack_optimizer(other, *packed, prefix="ema")


def test_an_atomic_file_keeps_its_suffix_while_it_is_written(tmp_path: Path) -> None:
    seen = []

    def write(temporary: Path) -> None:
        seen.append((temporary.suffix, temporary.parent))
        temporary.write_bytes(b"image")

    files.atomic_write(tmp_path / "new" / "grid.png", write)
    assert (tmp_path / "new" / "grid.png").read_bytes() == b"image"
    assert seen == [(".png", tmp_path / "new")]
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_an_atomic_text_is_written_as_it_is(tmp_path: Path) -> None:
    files.atomic_text(tmp_path / "a.json", "Zwölf\r\n\n")
    assert (tmp_path / "a.json").read_bytes() == "Zwölf\r\n\n".encode()


def test_a_kill_at_any_step_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    steps = count_steps(monkeypatch, lambda: files.atomic_text(path, "new"), stop=-1)
    seen = set()
    for stop in range(steps):
        path.write_text("old")
        count_steps(monkeypatch, lambda: files.atomic_text(path, "new"), stop)
        seen.add(path.read_text())
    assert seen == {"old", "new"}


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with largest_file(4096), pytest.raises(OSError):
        files.atomic_text(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
