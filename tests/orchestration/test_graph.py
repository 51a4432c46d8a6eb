"""The graph lists exactly Snakemake's jobs, with their inputs and resources."""

import dataclasses
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.dry_run import dry_run

from tafs.orchestration import graph as graphs
from tafs.orchestration.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
TAFS = "tafs_grpo.preference.flux-dev.0"


@pytest.fixture(scope="module")
def paper() -> Graph:
    return graphs.read({"scale": "paper"}, ROOT / "config.yaml")


def with_scale(graph: Graph, **changes) -> Graph:
    """The graph with other settings of its scale."""
    config = graph.plan.config
    scale = config.active.model_copy(update=changes)
    changed = config.model_copy(update={"scales": {**config.scales, config.scale: scale}})
    return Graph(dataclasses.replace(graph.plan, config=changed))


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_the_jobs_are_those_of_a_forced_dry_run(scale, tmp_path, monkeypatch):
    expected = dry_run(scale, tmp_path, "--forceall")
    overrides = {"scale": scale, "results": str(tmp_path)}
    monkeypatch.chdir(ROOT)
    assert Counter(graphs.read(overrides).jobs()) == expected
    assert list(tmp_path.iterdir()) == []


def test_jobs_wait_for_the_downloads_that_they_read(paper):
    names = [Path(mark).name for mark in paper.fetched(TAFS)]
    assert names == ["clip-vit-h-14", "clip-vit-l-14", "flux-dev", "pickapic", "pickscore"]
    judging = {Path(mark).name for mark in paper.fetched(TAFS, judging=True)}
    assert {"flux-dev", "pickapic", "hpsv2", "imagereward"} <= judging
    assert not judging & {"unifiedreward", "mask2former"}
    assert "unifiedreward" in {Path(mark).name for mark in paper.served_inputs}
    assert graphs.read({"scale": "smoke"}, ROOT / "config.yaml").reward_check == []


def test_without_a_server_the_metric_that_it_scores_is_neither_downloaded_nor_checked(paper):
    one_gpu = graphs.read({"scale": "one-gpu"}, ROOT / "config.yaml")
    served, none = ({Path(mark).name for mark in g.check_inputs} for g in (paper, one_gpu))
    assert served - none == {"unifiedreward", "siglip"}
    assert none < served
    assert {job.target for job in one_gpu.jobs() if job.rule == "fetch"}.isdisjoint(served - none)


def test_trainings_and_evaluations_take_all_gpus_of_a_node_and_other_stages_one(paper):
    train = paper.resources("train")
    assert (train["gpu"], train["nodes"], train["train_processes"]) == (8, 1, 8)
    assert [train["mem_mb"](None, attempt) for attempt in (1, 2, 3)] == [480_000, 720_000, 960_000]
    evaluate = paper.resources("evaluate")
    assert (evaluate["gpu"], evaluate["nodes"], evaluate["evaluate_processes"]) == (8, 1, 8)
    assert evaluate["mem_mb"](None, 1) == 480_000
    assert paper.resources("score_served")["gpu"] == 1
    evaluation = paper.scale.evaluation.model_copy(update={"processes": 2})
    assert with_scale(paper, evaluation=evaluation).resources("evaluate")["gpu"] == 2


def test_training_on_several_nodes_asks_for_gpus_per_node(paper):
    two = with_scale(paper, processes=16, nodes=2)
    train, evaluate = two.resources("train"), two.resources("evaluate")
    assert train["gres"] == "gpu:8" and "gpu" not in train
    assert train.items() >= {"mpi": "srun", "nodes": 2, "tasks": 2}.items()
    assert (evaluate["gpu"], evaluate["nodes"]) == (8, 1) and "mpi" not in evaluate


def test_the_servers_command_reaches_the_jobs_quoted(paper):
    server = ("it's", "{folder}")
    evaluation = paper.scale.evaluation.model_copy(update={"server": server})
    found = with_scale(paper, evaluation=evaluation).environment
    command = """["it'"'"'s", "{folder}"]"""
    assert found.format().startswith(
        f"""HF_HUB_OFFLINE=1 TAFS_SERVER='{{"unifiedreward": {command}, "unifiedreward2": ["""
    )


@pytest.mark.parametrize(
    "given, used",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_gpu_jobs_allocate_memory_in_segments_that_grow_unless_the_user_says_how(
    paper, given, used
):
    command = f"export {paper.environment.format()}; printenv PYTORCH_ALLOC_CONF"
    around = {"PATH": os.environ["PATH"], **given}
    assert subprocess.check_output(["bash", "-c", command], env=around, text=True) == f"{used}\n"
    assert "ALLOC" not in with_scale(paper, device="cpu").environment


def test_the_slurm_profile_limits_the_time_of_exactly_the_long_rules():
    profile = YAML(typ="safe").load(ROOT / "slurm" / "profile.yaml")
    rules = "".join(file.read_text() for file in (ROOT / "workflow" / "rules").glob("*.smk"))
    assert set(profile["set-resources"]) == set(re.findall(r'GRAPH\.resources\("(\w+)"\)', rules))
    assert profile["group-components"] == ["evaluations=4"]
