"""A copy of the project in which tests run the whole workflow and edit sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tafs.common import yaml_files

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("config.yaml", "claims.yaml", "resources.yaml", "environment.yml", "pyproject.toml")
NEEDED += ("workflow", "tafs", "baselines", "slurm")
RUN = "tafs_grpo.preference.shapes-flux.0"  # the only training of a reduced project


@dataclass(frozen=True)
class Project:
    """A copy of the project, and its results folder."""

    folder: Path
    results: Path

    @property
    def smoke(self) -> Path:
        return self.results / "smoke"

    def runs(self, method: str) -> list[str]:
        return [folder.name for folder in (self.smoke / "runs").glob(f"{method}.*")]

    @property
    def environment(self) -> dict[str, str]:
        programs = Path(sys.executable).parent
        return {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),  # instead of the installed package
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: str) -> list[str]:
        """`snakemake ARGUMENTS --config scale=smoke results=...`."""
        config = () if "--config" in arguments else ("--config",)
        return ["snakemake", *arguments, *config, "scale=smoke", f"results={self.results}"]

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, place = self.command(*arguments), {"cwd": self.folder, "env": self.environment}
        return subprocess.run(command, **place, capture_output=True, text=True)

    def start(self, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start the command in its own process group, without waiting for its end.

        Args:
            stderr: the jobs inherit it and keep a pipe open while they run.
        """
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def planned(self, *arguments: str) -> set[tuple[str, str]]:
        """Return (rule, run) of the jobs that a call would run."""
        done = self.snakemake("all", "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        jobs = re.split(r"^ *rule ", done.stdout + done.stderr, flags=re.MULTILINE)[1:]
        runs = [re.search(r"wildcards: run=(\S+)", job) for job in jobs]
        return {
            (job.partition(":")[0], run.group(1) if run else "")
            for job, run in zip(jobs, runs, strict=True)
        }

    @contextmanager
    def edited(self, name: str, old: str, new: str) -> Iterator[None]:
        """Replace `old` in a file of the copy inside the block."""
        file = self.folder / name
        text, status = file.read_text(), file.stat()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        try:
            yield
        finally:
            file.write_text(text)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def copied(folder: Path, results: Path) -> Project:
    """Copy the project to an empty folder."""
    for name in NEEDED:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
        else:
            ignored = shutil.ignore_patterns("__pycache__", "weights")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for weights in ("tafs/shapes/weights", "tafs/words/weights"):
        (folder / weights).symlink_to(ROOT / weights)
    return Project(folder, results)


def states(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return every file's time and content."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {f.relative_to(folder): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def reduced(folder: Path, iterations: int) -> Project:
    """Copy the project with one method and one table at its scale."""
    place = copied(folder, folder / "results")
    file = folder / "config.yaml"
    config = yaml_files.load_yaml(file, dict)
    config["scales"]["smoke"] |= {"experiments": ["gains"], "iterations": iterations}
    config["experiments"]["gains"]["methods"] = ["tafs_grpo"]
    del config["tuning"]  # it names the other methods
    file.write_text(json.dumps(config), encoding="utf-8")
    return place


# No number of seeds decides the first; two decide the second.
CLAIMS = """
- {id: same, claim: c, source: s, experiment: gains,
   better: {row: {method: tafs_grpo}, than: [{method: tafs_grpo}], negligible: 0, metrics: [clip]}}
- {id: sure, claim: c, source: s, experiment: gains,
   holds: {row: {method: tafs_grpo}, than: {method: base}, metrics: [clip], margin: 1.0e6}}
"""


def half_decided(folder: Path) -> Project:
    """Copy the project, reduced, with CLAIMS."""
    place = reduced(folder, iterations=1)
    file = folder / "config.yaml"
    config = yaml_files.load_yaml(file, dict)
    config["scales"]["smoke"]["evaluation"] |= {"samplers": ["ode"], "prompts": 2}
    file.write_text(json.dumps(config), encoding="utf-8")
    (folder / "claims.yaml").write_text(CLAIMS, encoding="utf-8")
    return place


def outcome(place: Project) -> dict[str, bytes]:
    """Return the tables and their inputs, without files that contain times."""
    files = [*place.smoke.glob("tables/*"), place.smoke / "claims.md"]
    files += place.smoke.glob("runs/*/*.safetensors")
    files += place.smoke.glob("runs/*/*.parquet")
    return {str(f.relative_to(place.smoke)): f.read_bytes() for f in files}


def assert_same(place: Project, other: Project) -> None:
    found, expected = outcome(place), outcome(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
