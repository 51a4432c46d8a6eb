"""Jobs on one machine use different GPUs and release them when they end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafs.common import errors
from tafs.runtime import gpus

ROOT = Path(__file__).resolve().parents[2]
CLAIM = """
import os, sys, time
from tafs.common import errors
from tafs.runtime import gpus

errors.run_cli("claim", lambda: gpus.claim(int(sys.argv[1]) or None))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
print(os.environ.get("PYTORCH_ALLOC_CONF", ""), flush=True)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a job that claims GPUs of a machine with three and prints them."""
    started = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "0,3,GPU-7f", "TMPDIR": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}  # without nvidia-smi

    def job(count: int, **changes: str | None) -> subprocess.Popen[str]:
        changed = {**environment, **changes}
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(count)],
            env={name: value for name, value in changed.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield job
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.readline().strip().split(",")


def refused(process: subprocess.Popen[str], code: int = 1) -> str:
    assert process.wait() == code
    assert process.stderr
    [line] = process.stderr.read().splitlines()
    return line.removeprefix("claim: ")


@pytest.mark.parametrize(
    "given, used",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ""),
    ],
)
def test_memory_is_allocated_in_segments_that_grow_unless_the_user_says_how(start, given, used):
    job = start(1, **{"PYTORCH_ALLOC_CONF": None, "PYTORCH_CUDA_ALLOC_CONF": None} | given)
    said(job)
    assert said(job) == [used]


def test_jobs_use_different_gpus_and_wait_for_free_ones(start: Start) -> None:
    first, second = start(2), start(1)
    assert sorted(said(first) + said(second)) == ["0", "3", "GPU-7f"]
    waiting = start(2)
    assert waiting.stderr
    assert waiting.stderr.readline() == "waits until 2 of 3 GPUs are free\n"
    first.kill()
    first.wait()
    assert len(said(waiting)) == 2


def test_slurm_jobs_do_not_share_locks_and_the_jobs_inside_one_do(start: Start) -> None:
    """Slurm numbers the GPUs of every job from 0."""
    assert said(start(3)) == said(start(3, SLURM_JOB_ID="17")) == ["0", "3", "GPU-7f"]
    inside = [said(start(n, SLURM_JOB_ID="18")) for n in (1, 2)]
    assert sorted(sum(inside, [])) == ["0", "3", "GPU-7f"]


WHOLE = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-7f01a2b3-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-7f02a2b3-0000-0000-0000-000000000000)
"""
SLICED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-6d89852c)
"""
HOSTILE = st.text("01 ,-GPUMIGx/.七②", max_size=12)


@pytest.mark.parametrize(
    ("given", "listing", "expected"),
    [
        (None, WHOLE, ["0", "1"]),
        (None, SLICED, ["MIG-c6d4f1ef", "MIG-cba663e8", "GPU-6d89852c"]),
        (None, "", []),
        (None, "No devices were found\n", []),
        ("1", WHOLE, ["1"]),
        (" 1, 0,", WHOLE, ["1", "0"]),
        ("GPU-7f02,0", WHOLE, ["GPU-7f02", "0"]),
        ("MIG-cba663e8", SLICED, ["MIG-cba663e8"]),
        ("3,GPU-7f,MIG-GPU-5c/7/0", None, ["3", "GPU-7f", "MIG-GPU-5c/7/0"]),
    ],
)
def test_visible_gpus_are_those_of_the_variable_or_all(given, listing, expected) -> None:
    assert gpus.visible(given, listing) == expected


@pytest.mark.parametrize("listing", [WHOLE, None])
@pytest.mark.parametrize(
    ("given", "what"),
    [
        *[(hidden, "hides all GPUs") for hidden in ("", " ", ",", "-1", "-1,0")],
        *[(twice, "has the GPU '0' twice") for twice in ("0,0", "0,1,0", " 0 ,0,")],
        ("0,00", "has the GPU '00' twice"),
        ("GPU-7f01,GPU-7f01", "has the GPU 'GPU-7f01' twice"),
        ("0,-1", "has '-1', neither the number nor the UUID of a GPU"),
        ("../x", "has '../x', neither the number nor the UUID of a GPU"),
        ("0;1", "has '0;1', neither the number nor the UUID of a GPU"),
        ("9" * 5000, "has '999"),
        ("all", "has 'all', neither the number nor the UUID of a GPU"),
        ("②", "has '②', neither the number nor the UUID of a GPU"),
    ],
)
def test_a_wrong_list_of_gpus_is_refused(given, what, listing) -> None:
    with pytest.raises(ValueError) as error:
        gpus.visible(given, listing)
    assert str(error.value).startswith(f"CUDA_VISIBLE_DEVICES: {errors.shown(given)} {what}")
    assert str(error.value).endswith("`nvidia-smi --list-gpus`, separated by commas, or unset it")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("2", "has '2', which is none of this machine's 2 GPUs"),
        ("0,GPU-8", "has 'GPU-8', which is none of this machine's 2 GPUs"),
        ("MIG-1", "has 'MIG-1', which is none of this machine's 2 GPUs"),
        ("GPU-7f0", "has 'GPU-7f0', which is more than one GPU"),
        ("0,GPU-7f01", "has the GPU 'GPU-7f01' twice"),
    ],
)
def test_gpus_that_the_machine_does_not_have_are_refused(given, what) -> None:
    with pytest.raises(ValueError, match=re.escape(f"CUDA_VISIBLE_DEVICES: {given!r} {what};")):
        gpus.visible(given, WHOLE)


@given(given=HOSTILE, listing=st.sampled_from([None, "", WHOLE, SLICED]))
def test_any_list_gives_different_gpus_or_one_line(given, listing) -> None:
    try:
        names = gpus.visible(given, listing)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert names and len(set(names)) == len(names)
        assert all(gpus.NAME.fullmatch(name) for name in names)


def test_a_job_of_no_given_number_takes_all_gpus_but_one_slice_only(start: Start) -> None:
    assert said(start(0)) == ["0", "3", "GPU-7f"]
    assert said(start(0, CUDA_VISIBLE_DEVICES="MIG-1,MIG-2")) == ["MIG-1"]


def test_a_job_that_needs_more_gpus_than_there_are_is_refused() -> None:
    gpus.require(["0", "1"], 2)
    gpus.require(["MIG-1", "MIG-2"], 1)
    few = r"needs 4 GPUs, and this machine shows 2 \(0, 1\); lower `processes`, or show"
    with pytest.raises(errors.RunFailed, match=few):
        gpus.require(["0", "1"], 4)
    with pytest.raises(errors.RunFailed, match=r"needs 1 GPUs, and this machine shows 0 \(none\)"):
        gpus.require([], 1)
    with pytest.raises(
        errors.RunFailed, match="needs 2 whole GPUs, and this machine shows MIG slices"
    ):
        gpus.require(["MIG-1", "MIG-2"], 2)


@pytest.mark.parametrize(
    ("count", "shown", "code", "line"),
    [
        (2, "0,0", 2, "CUDA_VISIBLE_DEVICES: '0,0' has the GPU '0' twice; give different"),
        (1, "-1", 2, "CUDA_VISIBLE_DEVICES: '-1' hides all GPUs; give different"),
        (4, "0,1", 1, "the job needs 4 GPUs, and this machine shows 2 (0, 1); lower"),
        (1, None, 1, "this machine's GPUs cannot be counted ("),
    ],
)
def test_a_job_without_its_gpus_ends_at_once_with_one_line(
    start: Start, count, shown, code, line
) -> None:
    process = start(count, CUDA_VISIBLE_DEVICES=shown)
    assert refused(process, code).startswith(line)


def test_a_job_asks_nvidia_smi_for_the_gpus(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{WHOLE}END\n")
    program.chmod(0o755)
    assert said(start(2, CUDA_VISIBLE_DEVICES=None)) == ["0", "1"]
    unknown = start(1, CUDA_VISIBLE_DEVICES="0,3")
    assert refused(unknown, 2).startswith("CUDA_VISIBLE_DEVICES: '0,3' has '3', which is none of")


@pytest.mark.parametrize("kind", ["link", "writable"])
def test_a_lock_folder_of_another_user_is_refused(start: Start, tmp_path: Path, kind: str) -> None:
    """Links in such a folder would make jobs write over this user's files."""
    locks, theirs = tmp_path / f"tafs-gpus-{os.getuid()}", tmp_path / "theirs"
    theirs.mkdir()
    if kind == "link":
        locks.symlink_to(theirs)
    else:
        locks.mkdir()
        locks.chmod(0o777)
    line = f"{locks}: is not this user's own folder; delete it, or set TMPDIR"
    assert refused(start(1)) == line
    assert list(theirs.iterdir()) == []
