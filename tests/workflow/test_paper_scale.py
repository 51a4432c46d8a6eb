"""The paper's scale from lock to tables: tiny random checkpoints, two processes a training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from diffusers import FluxPipeline
from safetensors import safe_open
from support import tiny_hub
from support.hub import Hub

from tafs.assets import cache, lockfile
from tafs.rewards.metrics import RESOURCES
from tafs.runtime import journal

ROOT = Path(__file__).resolve().parents[2]
TRAINED, BASE = "tafs_grpo.preference.flux-dev.0", "base.pickapic.flux-dev"
METRICS = {"pickscore", "clip", "hpsv2", "imagereward", "unifiedreward"}


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    programs = Path(sys.executable).parent
    around = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    return subprocess.run(
        ["snakemake", *arguments, "--config", "scale=paper"],
        cwd=folder,
        env=environment or around,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A small part of the graph has run here."""
    folder = tiny_hub.project(tmp_path_factory.mktemp("paper"), ["table2", "table7"], ["tafs_grpo"])
    with Hub(tiny_hub.write(folder / "hub")) as hub:
        around = tiny_hub.environment(folder, hub)
        lock = ["python", "-m", "tafs.assets.download", "lock", "--random-weights"]
        subprocess.run(lock, cwd=folder, env=around, check=True, capture_output=True)
        result = snakemake(folder, "all", **around)
    assert result.returncode == 0, result.stderr
    return folder


def run_folder(done: Path, name: str) -> Path:
    return done / "results/paper/runs" / name


def test_the_tiny_hub_has_every_repository_of_the_project():
    assert set(tiny_hub.WRITERS) == set(lockfile.read(ROOT / "resources.yaml"))


def test_only_what_the_jobs_need_was_fetched(done):
    fetched = {file.name for file in (done / "results/paper/resources").iterdir()}
    rewards = {name for names in RESOURCES.values() for name in names}
    assert fetched == {"flux-dev", "pickapic"} | rewards


def test_two_processes_trained_the_run(done):
    log = (done / f"results/paper/logs/train/{TRAINED}.log").read_text()
    assert "Traceback" not in log
    records = list(journal.iterations(run_folder(done, TRAINED) / "journal.jsonl"))
    assert [record["iteration"] for record in records] == [0, 1]
    assert all(record["grad_norm"] > 0 for record in records)


def test_every_metric_scored_every_image(done):
    for name in (BASE, TRAINED):
        folder = run_folder(done, name)
        files = [folder / "scores.parquet", folder / "served_scores.parquet"]
        table = pd.concat([pd.read_parquet(file) for file in files])
        assert set(table["metric"]) == METRICS
        counts = table.groupby("metric", observed=True)["value"].count()
        assert counts.nunique() == 1 and counts.min() > 0


def test_rewards_have_passed_their_canary(done):
    found = json.loads((done / "results/paper/golden.json").read_text())
    assert set(found) == METRICS | {"geneval"}
    assert all(record["version"] and record["scale"] for record in found.values())
    stored = json.loads((done / "resources.lock.golden.json").read_text())
    assert set(stored) == set(found)


def test_tables_and_claims_say_that_the_weights_are_random(done):
    root = done / "results/paper"
    for table in ("table2", "table7"):
        for suffix in ("md", "tex", "html"):
            text = (root / "tables" / f"{table}.{suffix}").read_text()
            assert "RANDOM WEIGHTS" in text and "flux-dev" in text
        marked = pd.read_csv(root / "tables" / f"{table}.csv")["random_weights"]
        assert marked.str.contains("flux-dev").all()
    assert "RANDOM WEIGHTS" in (root / "claims.md").read_text()


def test_claims_about_methods_that_the_scale_leaves_out_are_not_tested(done):
    found = json.loads((done / "results/paper/claims.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in found}
    assert verdicts["training_time"] == "not tested"
    assert verdicts["base"] != "not tested"


def test_a_table_can_be_traced_to_the_weights(done):
    lock = lockfile.read_lock(done / "resources.lock.yaml")
    record = json.loads((done / "results/paper/provenance/table2.json").read_text())
    run = record["runs"][TRAINED]
    assert set(run["provenance"]["weights"]) == {
        *("flux-dev", "pickapic", "pickscore", "clip-vit-h-14", "clip-vit-l-14"),
    }
    assert run["provenance"]["weights"]["flux-dev"] == cache.digest(
        "flux-dev", done / "resources.lock.yaml"
    )
    assert {"hpsv2", "imagereward", "unifiedreward"} <= set(run["metrics"])
    assert len(lock["flux-dev"].revision) == 40


def test_the_papers_values_stand_beside_ours(done):
    table = pd.read_csv(done / "results/paper/tables/table2.csv")
    assert table["clip_published"].tolist()[-1] == 27.68


def test_the_adapter_loads_in_a_plain_pipeline(done):
    adapter = run_folder(done, TRAINED) / "adapter.safetensors"
    with safe_open(adapter, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 8
    pipeline = FluxPipeline.from_pretrained(done / "hub/black-forest-labs/FLUX.1-dev")
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}


def test_changing_nothing_reruns_nothing(done):
    planned = snakemake(done, "all", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "Nothing to be done" in planned.stdout + planned.stderr


# -- without models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A copy of the project as it is, without a lock."""
    folder = tmp_path_factory.mktemp("fresh")
    tiny_hub.copy(folder)
    return folder


def test_the_whole_scale_can_be_planned_without_models(fresh):
    planned = snakemake(fresh, "all", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", planned.stdout + planned.stderr, re.MULTILINE))
    # Table 2's six, Table 1's two, five ablations and two more tasks; eleven models and Table 2's.
    assert int(jobs["train"]) == 6 + 2 + 5 + 2
    assert int(jobs["evaluate"]) == int(jobs["score_served"]) == 15 + 11 + 1
    assert int(jobs["fetch"]) == len(lockfile.read(ROOT / "resources.yaml"))


def test_nothing_runs_without_a_lock(fresh):
    refused = snakemake(fresh, "all")
    assert refused.returncode != 0
    assert "resources.lock.yaml: not found; the scale 'paper' runs only with pinned" in (
        refused.stderr
    )
    assert "Traceback" not in refused.stderr
    assert not (fresh / "results/paper/runs").exists()
