"""The files that say what is installed agree with each other and hold no path of any machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "requirements.txt",
    "requirements-nodeps.txt",
    "constraints.txt",
    "environment.yml",
    "Makefile",
    ".ci/run",
    ".gitignore",
)
TARGETS = ("setup", "all", "test", "ui", "shapes-weights", "lint", "lock", "constraints", "help")


def requirements(name: str) -> list[Requirement]:
    """The specifiers of a requirements file, without its comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pinned(specs: list[Requirement]) -> dict[str, Version]:
    """Canonical name -> version; a specifier that is no single `==` is an error."""
    versions: dict[str, Version] = {}
    for spec in specs:
        [specifier] = spec.specifier
        assert specifier.operator == "==", spec
        name = canonicalize_name(spec.name)
        assert name not in versions, f"{name} twice"
        versions[name] = Version(specifier.version)
    return versions


@pytest.fixture(scope="module")
def lock() -> dict[str, Version]:
    return pinned(requirements("constraints.txt"))


@pytest.fixture(scope="module")
def conda() -> tuple[list[str], list[str]]:
    """environment.yml's conda packages and its lines for pip."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return [entry for entry in dependencies if isinstance(entry, str)], pip


def test_the_lock_satisfies_every_requirement(lock: dict[str, Version]) -> None:
    for spec in requirements("requirements.txt"):
        assert spec.specifier.contains(lock[canonicalize_name(spec.name)]), spec


def test_the_lock_leaves_the_choice_of_torch_build_to_the_machine(lock: dict[str, Version]) -> None:
    assert all(version.local is None for version in lock.values())
    for spec in requirements("constraints.txt"):
        if spec.name.startswith(("nvidia-", "cuda-", "triton")):
            assert spec.marker is not None, spec
            assert not spec.marker.evaluate({"sys_platform": "darwin"}), spec


def test_packages_without_dependencies_are_pinned_and_not_in_the_lock(
    lock: dict[str, Version],
) -> None:
    versions = pinned(requirements("requirements-nodeps.txt"))
    assert set(versions) == {"hpsv2", "image-reward"}
    assert not set(versions) & set(lock)


def test_conda_environment_pins_what_the_lock_pins(
    conda: tuple[list[str], list[str]], lock: dict[str, Version]
) -> None:
    _, pip = conda
    assert "-c constraints.txt" in pip
    specs = [Requirement(line) for line in pip if not line.startswith("-")]
    versions = pinned(specs)
    assert versions == {name: lock[name] for name in versions}
    names = {canonicalize_name(spec.name) for spec in requirements("requirements.txt")}
    assert set(versions) == names


def test_conda_environment_has_the_locks_python(conda: tuple[list[str], list[str]]) -> None:
    packages = dict(entry.partition("=")[::2] for entry in conda[0])
    assert set(packages) == {"python", "git", "make", "pip"}
    [resolved_for] = re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert packages["python"] == resolved_for
    declared = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={resolved_for}"' in declared


def test_the_installed_versions_are_the_locked_ones(lock: dict[str, Version]) -> None:
    from importlib.metadata import version

    for spec in requirements("requirements.txt"):
        installed = Version(version(spec.name))
        assert installed.public == lock[canonicalize_name(spec.name)].public, spec.name


@pytest.mark.parametrize("name", FILES)
def test_file_holds_no_path_of_a_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.findall(r"(?<![\w.])/(?:home|root|opt|work|tmp|Users|usr/local)\b\S*", text)
    assert "file://" not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_and_explains_the_target(target: str) -> None:
    known = subprocess.run(
        ["make", "-n", "-B", target, "ARGS="], cwd=ROOT, capture_output=True, text=True
    )
    assert known.returncode == 0, known.stderr
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"^{target} +\S", listed.stdout, re.MULTILINE)


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    # Another stamp, so that an environment that is already there does not matter.
    command = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_is_executable_and_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make test", "make test-slurm"]


def test_results_are_ignored_but_for_the_reference_run() -> None:
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    assert patterns.index("/results/*") < patterns.index("!/results/reference/")
