"""The graph, run once at smoke scale in a copy of the project, and what reruns after a change.

The copy lets tests edit sources without touching the tree that everybody else works in.
"""

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

import pandas as pd
import pytest
from safetensors.torch import load_file

from tafs import journal
from tafs.rewards import METRICS

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "config.yaml",
    "claims.yaml",
    "environment.yml",
    "pyproject.toml",
    "workflow",
    "tafs",
    "baselines",
)
FLOW, TAFS = "flow_grpo.preference.shapes-sd3.0", "tafs_grpo.preference.shapes-sd3.0"
BASE = "base.shapes-sd3"
COMPARED = {("compare", ""), ("track", ""), ("all", "")}


@dataclass(frozen=True)
class Workplace:
    """A copy of the project and a results folder elsewhere."""

    folder: Path
    results: Path

    @property
    def smoke(self) -> Path:
        return self.results / "smoke"

    def runs(self, method: str) -> list[str]:
        return [folder.name for folder in (self.smoke / "runs").glob(f"{method}.*")]

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess:
        """`snakemake ARGUMENTS --config scale=smoke results=...`, as a person calls it."""
        config = () if "--config" in arguments else ("--config",)
        programs = Path(sys.executable).parent
        return subprocess.run(
            ["snakemake", *arguments, *config, "scale=smoke", f"results={self.results}"],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(self.folder),  # the copy, not what is installed
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def planned(self) -> set[tuple[str, str]]:
        """(rule, run) of the jobs that a call would run now."""
        done = self.snakemake("all", "--dry-run")
        assert done.returncode == 0, done.stderr
        jobs = re.split(r"^rule ", done.stdout + done.stderr, flags=re.MULTILINE)[1:]
        runs = [re.search(r"wildcards: run=(\S+)", job) for job in jobs]
        return {
            (job.partition(":")[0], run.group(1) if run else "")
            for job, run in zip(jobs, runs, strict=True)
        }

    @contextmanager
    def edited(self, name: str, old: str, new: str) -> Iterator[None]:
        """A file of the copy with `old` replaced inside the block, and as before after it."""
        file = self.folder / name
        text, status = file.read_text(), file.stat()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        try:
            yield
        finally:
            file.write_text(text)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """The whole graph has run here, once for all tests."""
    folder = tmp_path_factory.mktemp("project")
    for name in NEEDED:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
        else:
            ignored = shutil.ignore_patterns("__pycache__", "weights")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "tafs/shapes/weights").symlink_to(ROOT / "tafs/shapes/weights")
    place = Workplace(folder, tmp_path_factory.mktemp("results") / "absolute")
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    (place.results / "said.txt").write_text(done.stderr)
    return place


def states(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file's time and content."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {f.relative_to(folder): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


# -- what one call leaves behind -------------------------------------------------------------------


def test_every_promised_file_is_there_and_not_empty(workplace):
    promised = [
        f"tables/table2.{suffix}" for suffix in ("csv", "html", "json", "md", "parquet", "tex")
    ]
    promised += [
        f"figures/{name}.{suffix}"
        for name in ("figure4", "learning_curves", "image_grid", "hacking", "profiles")
        for suffix in ("png", "pdf")
    ]
    trained = ("run.json", "adapter.safetensors", "journal.jsonl", "scores.parquet")
    promised += [f"runs/{run}/{name}" for run in (FLOW, TAFS) for name in trained]
    promised += [f"runs/{run}/samples.safetensors" for run in (BASE, FLOW, TAFS)]
    promised += [f"runs/{BASE}/run.json", f"runs/{BASE}/scores.parquet"]
    promised += ["tables.json", "claims.md", "claims.json"]
    promised += [f"logs/{stage}/{FLOW}.log" for stage in ("describe", "train", "evaluate")]
    missing = [name for name in promised if not (workplace.smoke / name).is_file()]
    assert missing == []
    empty = [n for n in promised if (workplace.smoke / n).stat().st_size == 0 and "log" not in n]
    assert empty == []
    assert (workplace.results / "mlflow" / "mlflow.db").stat().st_size > 0


def test_images_and_documents_are_what_their_names_say(workplace):
    for file in (workplace.smoke / "figures").iterdir():
        starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
        assert file.read_bytes().startswith(starts[file.suffix]), file.name


@pytest.mark.parametrize("run", [BASE, FLOW, TAFS])
def test_scores_are_a_long_table_of_all_six_metrics(workplace, run):
    scores = pd.read_parquet(workplace.smoke / "runs" / run / "scores.parquet")
    assert {"run", "seed", "prompt", "nfe", "sampler", "image", "metric", "value"} <= set(scores)
    assert set(scores["metric"]) == set(METRICS)
    assert set(scores["run"]) == {run}
    assert scores["value"].notna().all()
    assert not scores.duplicated(["prompt", "nfe", "sampler", "image", "metric"]).any()


def test_the_journals_tell_every_iteration(workplace):
    for run in (FLOW, TAFS):
        folder = workplace.smoke / "runs" / run
        description = json.loads((folder / "run.json").read_text())
        records = journal.iterations(folder / "journal.jsonl")
        assert [r["iteration"] for r in records] == list(range(description["iterations"])) != []


def test_the_adapters_were_trained(workplace):
    for run in (FLOW, TAFS):
        adapter = load_file(workplace.smoke / "runs" / run / "adapter.safetensors")
        assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_nothing_but_results_is_left_behind(workplace):
    assert list(workplace.smoke.glob("runs/*/.state")) == []
    assert list(workplace.smoke.glob("runs/*/.progress/*")) == []
    here = {file.name for file in workplace.folder.iterdir()}
    assert here == {*NEEDED, ".snakemake"}


def test_the_last_line_says_where_the_results_are(workplace):
    said = (workplace.results / "said.txt").read_text().splitlines()
    assert said[-1].startswith("done in ")
    assert said[-1].endswith(f"{workplace.smoke}/tables/ and {workplace.smoke}/figures/")
    assert "Select jobs to execute..." not in said


# -- what a change reruns --------------------------------------------------------------------------


def test_a_second_call_has_nothing_to_do(workplace):
    before = states(workplace.results)
    done = workplace.snakemake("all")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr
    assert states(workplace.results) == before


def test_an_edited_method_reruns_its_own_runs_and_no_others(workplace):
    with workplace.edited("baselines/flow_grpo.py", "METHOD = FlowGrpo", "METHOD = FlowGrpo  # so"):
        own = {
            (stage, run) for stage in ("train", "evaluate") for run in workplace.runs("flow_grpo")
        }
        assert workplace.planned() == {*own, *COMPARED}


def test_a_changed_hyperparameter_reruns_its_methods_runs_and_no_others(workplace):
    old, new = "\n  tafs_grpo: {", "\n  tafs_grpo: {max_grad_norm: 0.5, "
    with workplace.edited("config.yaml", old, new):
        stages = ("describe", "train", "evaluate")
        own = {(stage, run) for stage in stages for run in workplace.runs("tafs_grpo")}
        assert workplace.planned() == {*own, *COMPARED}


# -- what goes wrong -------------------------------------------------------------------------------


def own_lines(stderr: str) -> list[str]:
    """Standard error without Snakemake's announcement of its profile."""
    return [line for line in stderr.splitlines() if "workflow specific profile" not in line]


def test_a_misspelt_key_is_one_line_that_names_it_and_starts_no_job(workplace):
    before = states(workplace.results)
    with workplace.edited("config.yaml", "  smoke:\n    world", "  smoke:\n    wrld"):
        done = workplace.snakemake("all")
    assert done.returncode == 2
    assert done.stdout == ""
    assert own_lines(done.stderr) == [
        "config.yaml: unknown key 'scales.smoke.wrld'; did you mean 'world'?"
    ]
    assert states(workplace.results) == before


def test_an_unknown_key_on_the_command_line_is_one_line_that_names_it(workplace):
    done = workplace.snakemake("all", "--config", "scael=shapes")
    assert done.returncode == 2
    [line] = own_lines(done.stderr)
    assert line.startswith("--config scael: only scale, results, method can be given")


def test_a_failing_run_is_named_and_leaves_the_other_results_as_they_were(workplace, tmp_path):
    other = Workplace(workplace.folder, tmp_path / "results")
    shutil.copytree(workplace.smoke, other.smoke)
    before = states(other.smoke)
    raising = """
def broken(*_):
    raise RuntimeError("no advantage in sight")

FlowGrpo.assign = broken
METHOD = FlowGrpo
"""
    with other.edited("baselines/flow_grpo.py", "METHOD = FlowGrpo\n", raising):
        done = other.snakemake("all")
    assert done.returncode == 1
    said = done.stderr.splitlines()
    log = other.smoke / "logs" / "train" / f"{FLOW}.log"
    at = said.index(f"FAILED train {FLOW} ({log})")
    assert "no advantage in sight" in said[at + 1]
    assert any(re.match(r"stopped after \d+:\d\d with 1 failed", line) for line in said)
    after = states(other.smoke)
    own = {file for file in before if FLOW in file.parts or file.stem == FLOW}
    assert {file: after.get(file) for file in before.keys() - own} == {
        file: before[file] for file in before.keys() - own
    }
    assert not (other.smoke / "runs" / FLOW / "adapter.safetensors").exists()
