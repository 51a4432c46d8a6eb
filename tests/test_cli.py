"""The command `tafs`: its imports, its errors and the arguments that it passes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tafs import cli
from tafs.orchestration import graph
from tafs.runtime.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
TAFS = "tafs_grpo.preference.shapes-flux.0"


def tafs(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tafs.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_the_commands_and_loads_no_torch():
    code = (
        "import contextlib, sys\n"
        "from tafs import cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(['--help'])\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, loaded = done.stdout.splitlines()
    assert loaded == "False"
    commands = ("plan", "status", "claims", "votes", "evaluate", "score", "sync")
    assert all(any(line.split()[:1] == [c] for line in printed) for c in commands)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "tafs: the following arguments are required: COMMAND (see tafs --help)"),
        (["plan", "--nodes", "0"], "plan: argument --nodes: '0' is not a whole number above 0"),
        (["plan", "--seeds", "1.5"], "argument --seeds: '1.5' is not a whole number above 0"),
        (["plan", "--gpu-hour-price", "nan"], "--gpu-hour-price: 'nan' is not a number above 0"),
        (["status", "--sc", "smoke"], "tafs: unrecognized arguments: --sc smoke"),
        (["status", "--every", "-1"], "argument --every: '-1' is not a number above 0"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("command", ["plan", "status", "sync"])
def test_an_unknown_scale_is_one_line(command):
    done = tafs(command, "--scale", "smoek")
    refusal = "config.yaml: scale: unknown scale 'smoek'; did you mean 'smoke'?"
    assert (done.returncode, done.stderr) == (2, f"tafs {command}: {refusal}\n")


def test_status_shows_the_scale_that_is_asked_for(tmp_path):
    done = tafs("status", "--scale", "smoke", "--results", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("scale smoke: 7 waiting; 0 of 14 jobs done\n")


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.chdir(ROOT)
    found = graph.read({"scale": "smoke", "results": str(tmp_path)})
    runs = list(found.plan.runs.values())[-2:]
    folders = [Path(found.folder(run.name)) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(run.to_json())
        Journal(folder / "journal.jsonl").append("start", fingerprint="x")
    return folders


def test_sync_mirrors_the_scales_runs_or_those_that_are_named(two_runs, tmp_path, capsys):
    own = ["sync", "--scale", "smoke", "--results", str(tmp_path)]
    elsewhere = ["--store", str(tmp_path / "other")]
    for arguments, count, store in (
        (own, 2, "mlflow"),
        ([*own, *elsewhere, str(two_runs[0])], 1, "other"),
        (["sync", str(two_runs[1]), "--results", str(tmp_path), *elsewhere], 1, "other"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        assert f"{count} runs in {tmp_path / store} " in capsys.readouterr().out
        client = MlflowClient(f"sqlite:///{tmp_path / store / 'mlflow.db'}")
        assert client.get_experiment_by_name("preference") is not None


def test_sync_without_runs_is_one_line(tmp_path):
    done = tafs("sync", "--scale", "smoke", "--results", str(tmp_path))
    refusal = f"{tmp_path}/smoke: contains no runs; start them with snakemake first"
    assert (done.returncode, done.stderr) == (2, f"tafs sync: {refusal}\n")


def test_claims_show_what_would_decide_them(capsys, tmp_path):
    def shown(*options):
        with pytest.raises(SystemExit) as ended:
            cli.main(["claims", "--results", str(tmp_path), "--scale", "smoke", *options])
        return ended.value.code, capsys.readouterr()

    file = tmp_path / "smoke" / "claims.json"
    code, printed = shown()
    assert (code, printed.err.count("\n")) == (2, 1)
    assert f"{file}: not found; the workflow's rule compare writes it" in printed.err
    compared = {"what": "CLIP: a - b", "value": 0.5, "half_width": 1.25, "supports": 0}
    claim = {"id": "one", "verdict": "undecided", "comparisons": [compared | {"needed": "9 seeds"}]}
    file.parent.mkdir()
    file.write_text(json.dumps([claim]))
    code, printed = shown()
    assert (code, printed.out) == (0, "one: undecided\n")
    code, printed = shown("--power")
    assert printed.out == "one: undecided\n  +0.5 +- 1.25  CLIP: a - b (open; 9 seeds)\n"
    file.write_text(json.dumps([claim | {"comparisons": [compared]}]))
    code, printed = shown("--power")
    assert code == 2 and "claims.json: not the claims of this version" in printed.err
