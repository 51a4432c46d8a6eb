"""Every script of benchmarks/ runs and prints its figures; rehearse.py has its own tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import browser

from tafs.report.page import VIEWS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    file.name for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text()
}
TESTED = {
    "clean_renders.py",
    "cpu_share.py",
    "interval_coverage.py",
    "memory_model.py",
    "page_opening.py",
    "rehearse.py",
    "same_results.py",
    "tracking.py",
    "training_loop.py",
}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def printed(script: str, *arguments: object) -> str:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_has_a_test():
    assert SCRIPTS == TESTED


def test_the_recogniser_reads_clean_renders_in_every_font():
    header, *rows = printed("clean_renders.py", "--prompts", 5).splitlines()
    assert header.split() == ["font", "all", "numbers", "short", "long"]
    assert len(rows) == 3 and all(float(row.split()[1]) >= 0.9 for row in rows)


@pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium on the PATH")
def test_page_opening_prints_sizes_and_the_seconds_of_every_view(tmp_path):
    (tmp_path / "index.html").write_bytes(b"<title>page</title>".ljust(200_000))
    size, header, *rows = printed("page_opening.py", tmp_path, "--repeats", 1).splitlines()
    assert size == "0.2 MB page, 0.2 MB with all images"
    assert header.split() == ["view", "seconds", "CPU", "s", "images"]
    assert [row.split()[0] for row in rows] == list(VIEWS)
    for row in rows:
        _, seconds, cpu, images = row.split()
        assert float(cpu) > 0 and 0 < float(seconds) < 60 and images == "0"


def test_training_loop_compares_the_methods_of_a_scale():
    smallest = ("--scale", "smoke", "--repeats", 1, "--methods", "tafs_grpo", "flow_grpo")
    head, *rows = printed("training_loop.py", *smallest).splitlines()
    assert "over bare calls" in head
    found = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in rows}
    assert set(found) == {"tafs_grpo", "flow_grpo"}
    assert found["tafs_grpo"][3:] == [1.0, 1.0, 1.0]
    assert found["flow_grpo"][4:] == [pytest.approx(28 / 13, abs=1e-3), 2.14]


def test_training_loop_names_a_backbone_without_runs():
    done = run("training_loop.py", "--scale", "smoke", "--backbone", "nothing")
    assert done.returncode == 2
    assert "no run of tafs_grpo on nothing at scale smoke" in done.stderr


def test_cpu_share_adds_journals_and_evaluations(tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    seconds = {"sample": 1.0, "reward": 2.0, "update": 3.0, "total": 6.0}
    record = {"kind": "iteration", "iteration": 0, "seconds": seconds}
    (folder / "journal.jsonl").write_text(json.dumps(record) + "\n")
    log = tmp_path / "logs" / "evaluate" / "run.log"
    log.parent.mkdir(parents=True)
    evaluated = {"evaluated": "run", "seconds": {"sample": 4.0, "reward": 5.0}}
    log.write_text(f"a warning\n{json.dumps(evaluated)}\n")
    time = tmp_path / "time.txt"
    time.write_text("\tUser time (seconds): 18.00\n\tSystem time (seconds): 2.00\n")
    assert printed("cpu_share.py", tmp_path, time).splitlines() == [
        "CPU 20 s   sample 5 s  reward 7 s  update 3 s",
        "outside sampling, rewards and updates: 25.0%",
    ]
    time.write_text("")
    assert "not the output of /usr/bin/time -v" in run("cpu_share.py", tmp_path, time).stderr


def test_interval_coverage_takes_the_variation_of_a_report(tmp_path):
    gains = tmp_path / "gains.json"
    parts = {"clip": {"seeds": 0.04, "prompts": 1.0, "residual": 0.25}}
    gains.write_text(json.dumps({"variance": {"A": parts, "B": parts}}))
    options = ("--gains", gains, "--metric", "clip", "--seeds", 3, "--replicates", 20)
    _, systems, _, *rows = printed("interval_coverage.py", *options).splitlines()
    assert systems == "A 0.20/0.50  B 0.20/0.50"
    names = [re.split(r"\s{2,}", row)[0] for row in rows]
    assert names == ["A - base", "B - base", "A - B", "B - A"]
    assert all(float(row.split()[-3]) > 0.7 for row in rows)
    done = run("interval_coverage.py", "--gains", gains, "--metric", "nothing")
    assert "gains.json: no variance of nothing between seeds" in done.stderr


def test_the_memory_of_an_iteration_is_predicted_within_15_per_cent_of_measured_peaks():
    """Within 5 % for the adapter layer and the decoder that are predicted.

    The others are peft's layer, and decoders that need less: compiled, or with bfloat16 weights.
    """
    output = printed("memory_model.py")
    assert output in (ROOT / "results/reference/gpu/README.md").read_text()
    _, _, *rows = output.splitlines()
    lines = sum(
        '"peak_gb"' in line
        for file in (ROOT / "results/reference/gpu").glob("*.jsonl")
        for line in file.read_text().splitlines()
    )
    assert lines / 2 < len(rows) <= lines
    for row in rows:
        _, _, case, predicted, measured, difference, _ = map(str.strip, row.split("|"))
        largest = max(abs(float(predicted) / float(value) - 1) for value in measured.split(" to "))
        assert abs(float(difference.removesuffix(" %"))) / 100 == pytest.approx(largest, abs=0.01)
        other = "peft's layer" in case or re.match("decode (bfloat16|.* compiled)", case)
        assert largest < (0.15 if other else 0.05), row


def test_same_results_names_the_files_that_differ(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        folder = tmp_path / name / "runs" / "run"
        folder.mkdir(parents=True)
        save_file({"x": torch.tensor([value])}, folder / "adapter.safetensors")
    assert printed("same_results.py", tmp_path / "a", tmp_path / "b") == "the same\n"
    other = run("same_results.py", tmp_path / "a", tmp_path / "c")
    assert (other.returncode, other.stdout) == (1, "runs/run/adapter.safetensors: differs\n")


def test_same_results_compares_adapters_with_their_strength(tmp_path):
    for name, alpha, value in (("a", 8, 1.0), ("b", 4, 2.0), ("c", 4, 1.0)):
        folder = tmp_path / name / "runs" / "run"
        folder.mkdir(parents=True)
        header = json.dumps({"transformer.r": 4, "transformer.lora_alpha": alpha})
        b = torch.full((1, 4), value)
        tensors = {"x.lora_A.weight": torch.ones(4, 1), "x.lora_B.weight": b}
        file = folder / "adapter.safetensors"
        save_file(tensors, file, {"lora_adapter_metadata": header})
    assert printed("same_results.py", tmp_path / "a", tmp_path / "b") == "the same\n"
    assert "differs" in run("same_results.py", tmp_path / "a", tmp_path / "c").stdout


def test_tracking_measures_a_training_beside_dead_servers():
    names = ["alone", "the server is gone"]
    smallest = ("--repeats", 1, "--iterations", 1, "--every", 1, "--places", *names)
    _, *rows, last = printed("tracking.py", *smallest).splitlines()
    assert [re.split(r"\s{2,}", row)[0].strip() for row in rows] == names
    assert last == "the adapters are identical"
