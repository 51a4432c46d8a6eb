"""`tafs doctor`: each check finds what is missing and names its remedy."""

from __future__ import annotations

import json
import sqlite3
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from support.hub import Hub
from test_cli import ROOT, ended

from tafs.assets import lockfile
from tafs.assets.lockfile import Locked, LockedFile, Resource
from tafs.cli import doctor
from tafs.cli.doctor import OK, PROBLEM, UNKNOWN, UNUSED


def checked(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the findings by name)."""
    code = ended("doctor", *options, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    return code, {check["name"]: check for check in found["checks"]}


def test_the_embedded_scale_has_what_it_needs_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, found = checked(capsys, "--scale", "smoke", "--results", str(tmp_path))
    assert code == 0
    for name in ("python", "packages", "configuration", "disk", "memory", "tracking"):
        assert found[name]["state"] == OK
    assert found["gpus"]["state"] == found["models"]["state"] == UNUSED


def test_a_published_scale_lacks_its_gpus_models_and_token(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # also on a machine with GPUs
    monkeypatch.setattr(doctor, "partitions", lambda: doctor.Check("slurm", UNKNOWN, ""))
    given = ("--scale", "one-gpu", "--results", str(tmp_path))
    code, found = checked(capsys, *given)
    assert code == 1
    for name in ("gpus", "models", "token"):
        assert found[name]["state"] == PROBLEM and found[name]["remedy"]
    for name in ("hub", "licence sd35-medium"):
        assert found[name]["state"] == UNKNOWN
        assert found[name]["found"].endswith("HF_HUB_OFFLINE is set")
    assert ended("doctor", *given) == 1
    text = capsys.readouterr().out
    assert f"\n  models: {found['models']['remedy']}\n" in text and text.isascii()


def test_a_folder_without_a_configuration_is_a_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, found = checked(capsys)
    assert code == 1 and "config.yaml" in found["configuration"]["found"]


def test_wrong_versions_are_named():
    assert doctor.python("3.9.1").state == PROBLEM
    assert doctor.python("3.12.1").state == OK
    found = doctor.packages(["numpy<1", "absent-package>=1", "rich", "absent-too; extra == 'test'"])
    assert found.state == PROBLEM
    assert "numpy " in found.found and " is not <1; absent-package is not installed" in found.found
    assert "absent-too" not in found.found
    assert doctor.packages(["numpy>1", "rich"]) == ("packages", OK, "2 requirements", "")


@pytest.mark.parametrize(
    "needed, slurm, state", [(1, False, OK), (1e12, False, PROBLEM), (1e12, True, UNUSED)]
)
def test_memory_is_compared_with_the_largest_job(needed, slurm, state):
    found = doctor.memory(needed, "evaluate x", slurm)
    assert found.state == state and f"{needed / 1e3:.1f} GB for evaluate x" in found.found


@pytest.mark.parametrize(
    "needed, slurm, state", [(False, False, UNUSED), (True, False, PROBLEM), (True, True, UNUSED)]
)
def test_gpus_matter_where_trainings_run(needed, slurm, state, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # also on a machine with GPUs
    *_, gpus = doctor.gpus(needed, 1, slurm)
    assert gpus.state == state


@pytest.mark.parametrize(
    "given, state, found",
    [
        (24, OK, "85.2 GB, and the scale makes use of 24 GB; gpu_memory: 85 in the scale makes "),
        (80, OK, "85.2 GB, and the scale makes use of 80 GB"),
        (141, PROBLEM, "85.2 GB, and the scale makes use of 141 GB"),
    ],
)
def test_the_gpus_are_compared_with_the_memory_that_a_scale_makes_use_of(
    given, state, found, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes = [SimpleNamespace(total_memory=gigabytes * 10**9) for gigabytes in (150.1, 85.2)]
    monkeypatch.setattr("torch.cuda.get_device_properties", sizes.__getitem__)
    [check] = doctor.gpu_memory(given)
    assert (check.state, check.found[: len(found)]) == (state, found)
    assert check.remedy == ("set gpu_memory: 85 in the scale" if state == PROBLEM else "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert not [*doctor.gpu_memory(given)]


def test_partitions_are_listed_with_their_gpus(tmp_path, monkeypatch):
    program = tmp_path / "sinfo"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.partitions().state == UNUSED
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    assert doctor.partitions().state == UNKNOWN
    program.write_text(
        "#!/bin/sh\necho 'gpu gpu:h100:8(S:0-1),tmp:9'\necho 'gpu gpu:a100:4'\necho 'cpu (null)'\n"
    )
    found = doctor.partitions()
    assert found.state == OK
    assert found.found.startswith("cpu (no GPUs); gpu (gpu:a100:4, gpu:h100:8); ")


def test_a_broken_store_is_a_problem(tmp_path):
    assert doctor.tracking(tmp_path).state == OK  # not made yet
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"not a database" * 100)
    assert doctor.tracking(tmp_path).state == PROBLEM
    database.unlink()
    with sqlite3.connect(database) as made:
        made.execute("CREATE TABLE runs (id)")
    assert doctor.tracking(tmp_path)[1:3] == (OK, f"{tmp_path}: 0 runs")


def test_licences_are_asked_of_the_hub(tmp_path, monkeypatch):
    names = {"open": "owner/open", "accepted": "owner/accepted", "closed": "owner/closed"}
    resources = {
        name: Resource(
            hub=hub,
            files=("model_index.json",),
            licence="A licence",
            gated=name != "open",
            gigabytes=1,
            used_for="tests",
        )
        for name, hub in names.items()
    }
    lock = tmp_path / "lock.yaml"
    file = LockedFile(size=2, sha256="0" * 64)
    locked = {
        name: Locked(hub=hub, revision="0" * 40, files={"model_index.json": file})
        for name, hub in names.items()
    }
    lockfile.write(lock, locked)
    for hub in names.values():
        (tmp_path / "hub" / hub).mkdir(parents=True)
        (tmp_path / "hub" / hub / "model_index.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        hub.faults.known_tokens = {"hf_mine"}
        hub.faults.gated = {"owner/closed"}
        states = {check.name: check for check in doctor.hub(resources, lock)}
    assert [states[name].state for name in ("models", "token", "hub")] == [OK, OK, OK]
    assert states["licence accepted"].state == OK
    assert states["licence closed"].state == PROBLEM
    assert states["licence closed"].remedy.startswith(f"accept it on {hub.url}/owner/closed")
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    found = {check.name: check.state for check in doctor.hub(resources, lock)}
    assert found["hub"] == found["licence closed"] == UNKNOWN
