"""The paper scale from lock file to tables, with tiny random models and two training processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from diffusers import FluxPipeline
from safetensors import safe_open
from support import tiny_hub
from support.hub import Hub
from support.paper_metrics import METRICS

from tafs import experiment
from tafs.assets import cache, lockfile
from tafs.runtime import journal

ROOT = Path(__file__).resolve().parents[2]
TRAINED, BASE = "tafs_grpo.preference.flux-dev.0", "base.pickapic.flux-dev"
SCORED = set(METRICS) - {"geneval"}  # on Pick-a-Pic


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
    """`snakemake all` has run here for two tables and one method, judged by two processes."""
    folder = tmp_path_factory.mktemp("paper")
    tiny_hub.project(folder, ["table2", "table7"], ["tafs_grpo"], processes=2)
    with Hub(tiny_hub.write(folder / "hub")) as hub:
        around = tiny_hub.environment(folder, hub)
        lock = ["python", "-m", "tafs.assets.download", "lock", "--random-weights"]
        subprocess.run(lock, cwd=folder, env=around, check=True, capture_output=True)
        result = snakemake(folder, "all", **around)
    assert result.returncode == 0, result.stderr
    return folder


def run_folder(done: Path, name: str) -> Path:
    return done / "results/paper/runs" / name


def test_the_tiny_hub_has_every_repository_of_resources_yaml():
    assert set(tiny_hub.WRITERS) == set(lockfile.read(ROOT / "resources.yaml"))


@pytest.mark.parametrize("scale", ["paper", "one-gpu"])
def test_the_rehearsal_of_a_scale_has_its_experiments_and_methods(scale, tmp_path):
    shutil.copy(ROOT / "claims.yaml", tmp_path)
    (tmp_path / "config.yaml").write_text(tiny_hub.configure(ROOT / "config.yaml", (), (), scale))
    small, real = (
        experiment.load({"scale": scale}, folder / "config.yaml") for folder in (tmp_path, ROOT)
    )
    assert list(small.runs) == list(real.runs)
    assert [table.name for table in small.tables] == [table.name for table in real.tables]
    assert small.config.active.device == "cpu"
    for name, evaluation in small.evaluations.items():
        assert evaluation.served == real.evaluations[name].served
    # Figures of images show every system at few steps, which are not on the small curve.
    for row, few in [(r, t.few_nfe) for t in small.tables if "images" in t.figures for r in t.rows]:
        settings = small.evaluations[row.runs[0]].settings
        assert (row.sampler, few) in {(setting.sampler, setting.nfe) for setting in settings}


def test_only_what_the_jobs_read_was_downloaded(done):
    fetched = {file.name for file in (done / "results/paper/resources").iterdir()}
    rewards = {name for metric in METRICS.values() for name in metric.resources}
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
        assert set(table["metric"]) == SCORED
        counts = table.groupby("metric", observed=True)["value"].count()
        assert counts.nunique() == 1 and counts.min() > 0


def test_the_rewards_were_checked(done):
    found = json.loads((done / "results/paper/reward_check.json").read_text())
    assert set(found) == set(METRICS)
    assert all(record["version"] and record["scale"] for record in found.values())
    stored = json.loads((done / "resources.lock.golden.json").read_text())
    assert set(stored) == set(found)


def test_random_base_models_do_not_hold_the_trainings(done):
    found = json.loads((done / "results/paper/base_check.json").read_text())
    assert "flux-dev" in found["random_weights"] and found["values"] == []


def test_tables_and_claims_are_marked_where_weights_are_random(done):
    root = done / "results/paper"
    for table in ("table2", "table7"):
        for suffix in ("md", "tex", "html"):
            text = (root / "tables" / f"{table}.{suffix}").read_text()
            assert "RANDOM WEIGHTS" in text and "flux-dev" in text
        marked = pd.read_csv(root / "tables" / f"{table}.csv")["random_weights"]
        assert marked.str.contains("flux-dev").all()
    assert "RANDOM WEIGHTS" in (root / "claims.md").read_text()


def test_claims_about_excluded_methods_are_not_tested(done):
    found = json.loads((done / "results/paper/claims.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in found}
    assert verdicts["training_time"] == "not tested" != verdicts["base"]


def test_the_provenance_of_a_table_names_the_weights(done):
    lock = done / "resources.lock.yaml"
    record = json.loads((done / "results/paper/provenance/table2.json").read_text())
    run = record["runs"][TRAINED]
    names = ("flux-dev", "pickapic", "pickscore", "clip-vit-h-14", "clip-vit-l-14")
    assert run["provenance"]["weights"] == {name: cache.digest(name, lock) for name in names}
    assert {"hpsv2", "imagereward", "unifiedreward"} <= set(run["metrics"])
    assert len(lockfile.read_lock(lock)["flux-dev"].revision) == 40


def test_published_values_are_beside_ours(done):
    table = pd.read_csv(done / "results/paper/tables/table2.csv")
    assert table["clip_published"].tolist()[-1] == 27.68


def test_the_adapter_loads_in_a_plain_pipeline(done):
    adapter = run_folder(done, TRAINED) / "adapter.safetensors"
    with safe_open(adapter, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == metadata["transformer.r"] == 4
    assert metadata["transformer.base_model_name_or_path"] == "black-forest-labs/FLUX.1-dev"
    pipeline = FluxPipeline.from_pretrained(done / "hub/black-forest-labs/FLUX.1-dev")
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}


def test_a_second_call_has_nothing_to_do(done):
    planned = snakemake(done, "all", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "Nothing to be done" in planned.stdout + planned.stderr


def test_without_a_lock_file_the_scale_is_planned_and_does_not_run(tmp_path):
    tiny_hub.copy(tmp_path)
    planned = snakemake(tmp_path, "all", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", planned.stdout + planned.stderr, re.MULTILINE))
    # Trained: Table 2's six, Table 1's two, six ablations, two more tasks. Untrained: the eleven
    # models of Table 1, and Table 2's base model.
    assert int(jobs["train"]) == 6 + 2 + 6 + 2
    assert int(jobs["evaluate"]) == int(jobs["score_served"]) == 16 + 11 + 1
    # The scale one-gpu has a model of its own, and no experiment asks for the optional metrics.
    known = lockfile.read(ROOT / "resources.yaml").keys()
    others = {"flux2-klein-base-4b", "hpsv3", "qwen2-vl-7b", "qwen3-vl-8b", "unifiedreward-2"}
    assert int(jobs["fetch"]) == len(known - {*others, "geneval2"})
    refused = snakemake(tmp_path, "all")
    assert refused.returncode != 0
    message = "resources.lock.yaml: not found; the scale 'paper' runs only with pinned"
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "results/paper/runs").exists()
