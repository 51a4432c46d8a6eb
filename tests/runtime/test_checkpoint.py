"""A loaded resume state is bit-identical to the saved one; damaged ones are skipped by name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafs.runtime import checkpoint
from tafs.runtime.receipts import Needs

NEEDS = {"seed": 1, "method": "flow_grpo"}
OTHER = {"seed": 2, "method": "flow_grpo"}
FILES = (checkpoint.TENSORS, checkpoint.VALUES, checkpoint.MANIFEST)


def save(folder: Path, iteration: int, needs: Needs = NEEDS) -> None:
    weight = torch.full((3, 4), float(iteration))
    checkpoint.save(folder, needs, iteration, {"weight": weight}, {"seen": iteration * 10})


def load(folder: Path, needs: Needs = NEEDS) -> checkpoint.State:
    state = checkpoint.load(folder, needs)
    assert state is not None
    assert torch.equal(state.tensors["weight"], torch.full((3, 4), float(state.iteration)))
    assert state.values == {"seen": state.iteration * 10}
    return state


def newest(folder: Path) -> Path:
    return max(path for path in folder.iterdir() if path.name.isdecimal())


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether dtypes, shapes and all bits are equal, NaN included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


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
        "half": torch.randn(5).bfloat16(),
    }
    values = {"lr": 0.1 + 0.2, "big": 2**70, "text": "Zwölf", "nested": {"list": [1, None, True]}}
    checkpoint.save(folder, NEEDS, 12, tensors, values)
    state = checkpoint.load(folder, NEEDS)
    assert state is not None
    assert (state.iteration, state.values, state.notes) == (12, values, [])
    assert state.tensors.keys() == tensors.keys()
    assert all(identical(state.tensors[name], tensors[name]) for name in tensors)


def test_the_newest_of_two_generations_is_loaded(folder: Path) -> None:
    assert checkpoint.load(folder, NEEDS) is None
    for iteration in range(12):
        save(folder, iteration)
        state = load(folder)
        assert (state.iteration, state.notes) == (iteration, [])
    assert len(list(folder.iterdir())) == checkpoint.KEPT


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        *((name, None, f"{name}: cannot be read (No such file") for name in FILES),
        *((name, "", f"{name} is damaged") for name in FILES),
        *((FILES[2], text, "manifest.json is damaged") for text in ("[]", "{}", '{"sha256": []}')),
    ],
)
def test_a_missing_or_damaged_file_is_noticed_and_the_previous_state_used(
    folder: Path, name: str, content: str | None, note: str
) -> None:
    save(folder, 1)
    for iteration in (2, 3):  # damaged states never displace an intact one
        save(folder, iteration)
        (newest(folder) / name).unlink()
        if content is not None:
            (newest(folder) / name).write_text(content)
    state = load(folder)
    assert state.iteration == 1
    assert note in state.notes[0]


def test_a_state_of_other_settings_is_named_and_stays_beside_the_new_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 7, OTHER)
    assert checkpoint.load(folder, NEEDS) is None
    (message,) = caplog.messages
    assert "it is of other settings (seed: 2 -> 1)" in message
    save(folder, 0, NEEDS)
    assert load(folder, NEEDS).iteration == 0
    old = load(folder, OTHER)
    assert (old.iteration, len(old.notes)) == (7, 1)
    save(folder, 1, NEEDS)
    assert checkpoint.load(folder, OTHER) is None
    for _ in range(2):
        checkpoint.clear(folder)
        assert not folder.exists()


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
    """Update with gradients that depend on the weights, so that an error would grow."""
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
    tmp_path_factory, shapes, before, lr, decay, amsgrad, seed
):
    def build(weights: list[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
        groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": lr / 2}]
        settings = {"betas": (0.85, 0.97), "weight_decay": decay, "amsgrad": amsgrad}
        return torch.optim.AdamW(groups, lr=lr, **settings)

    folder = tmp_path_factory.mktemp("state")
    weights = parameters(shapes, seed)
    optimizer = build(weights, lr)
    for index in range(before):
        step(optimizer, index)
    tensors, values = checkpoint.pack_optimizer(optimizer)
    tensors |= {f"weights/{i}": weight for i, weight in enumerate(weights)}
    checkpoint.save(folder, NEEDS, before, tensors, {"other": 1, **values})

    state = checkpoint.load(folder, NEEDS)
    assert state is not None
    resumed = parameters(shapes, seed + 1)
    # Its learning rate is overwritten by the state's.
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
    packed = checkpoint.pack_optimizer(optimizer)
    kept = {key: tensor.clone() for key, tensor in packed[0].items()}
    for _ in range(2):
        step(optimizer, 1)
        assert all(identical(packed[0][key], kept[key]) for key in kept)
        checkpoint.unpack_optimizer(optimizer, *packed)
    other = torch.optim.AdamW(parameters([(2,), (3,)], 0))
    with pytest.raises(ValueError, match="parameter group"):
        checkpoint.unpack_optimizer(other, *packed)
