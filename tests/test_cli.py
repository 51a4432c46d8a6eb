"""The command `tafs`: imports, errors, exit codes, what it prints and passes on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from mlflow.tracking import MlflowClient
from PIL import Image

from tafs import cli
from tafs.cli import output, workflow
from tafs.evaluation import protocol, sample
from tafs.methods import template as method_template
from tafs.orchestration import graph
from tafs.report import leaderboard
from tafs.runtime import progress
from tafs.runtime.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
TAFS = "tafs_grpo.preference.shapes-flux.0"


def tafs(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tafs.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def ended(*arguments: str) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return int(end.value.code or 0)


COMMANDS = ("plan", "run", "status", "sync", "claims", "compare", "leaderboard", "report", "votes")
COMMANDS += ("evaluate", "score", "sample", "doctor", "new")


def test_help_names_the_commands_and_loads_no_large_library():
    code = (
        "import contextlib, sys\n"
        "from tafs import cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(['--help'])\n"
        "large = ('torch', 'pandas', 'mlflow', 'snakemake', 'pydantic', 'numpy')\n"
        "print([name for name in large if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert all(any(line.split()[:1] == [c] for line in printed) for c in COMMANDS)
    assert done.stdout.isascii()  # no boxes and colours in a pipe
    assert any("Exit codes: 0 done; 1 failed" in line for line in printed)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "tafs: Missing command (see tafs --help)"),
        (["plam"], "tafs: No such command 'plam'. Did you mean 'plan', 'claims'?"),
        (["new", "methods", "x"], "tafs new: No such command 'methods'. Did you mean 'method'"),
        (["plan", "--nodes", "0"], "tafs plan: Invalid value for '--nodes': '0' is not a whole"),
        (["plan", "--seeds", "1.5"], "'--seeds': '1.5' is not a whole number above 0"),
        (["plan", "--gpu-hour-price", "nan"], "'--gpu-hour-price': 'nan' is not a number above 0"),
        (["status", "--sc", "smoke"], "tafs status: No such option: --sc (Possible options: "),
        (["status", "--every", "-1"], "'--every': '-1' is not a number above 0"),
        (["status", "--every", "9", "--json"], "--every: cannot be combined with --json"),
        (["evaluate", "--model", "x"], "Missing option '--protocol' (see tafs evaluate --help)"),
        (["evaluate", "--model=x", "--protocol=y"], "--adapter, --base: give one of them"),
        (["sample", "--steps", "1"], "--run, --model: give one of them"),
        (["sample", "--steps=1", "--model=x", "--out=x.jpg"], "x.jpg: give a .png or .pdf file"),
        (["sample", "--steps=1", "--model=x"], "--prompt, --prompts: give at least one prompt"),
        (["sample", "--steps=1", "--model=shapes-sd3", "--prompt=a dog"], "'a dog': has 'dog', "),
        (["new", "method", "TAFS"], "tafs new method: 'TAFS' is not a valid name"),
        (["new", "reward", "clip"], "tafs new reward: 'clip' is taken"),
        (["new", "prompts", "shapes"], "tafs new prompts: 'shapes' is taken"),
        (["new", "model", "flux-dev"], "tafs new model: 'flux-dev' is taken"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(ROOT)
    assert ended(*arguments) == 2
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


def test_json_of_plan_and_status_has_the_numbers_of_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    where = ("--scale", "smoke", "--results", str(tmp_path))
    assert ended("status", *where, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["jobs"] == {"done": 0, "total": 14} and found["counts"] == {"waiting": 7}
    assert {run["state"] for run in found["runs"]} == {"waiting"}
    assert ended("plan", *where, "--json", "--tflops", "1", "--gpu-hour-price", "2") == 0
    found = json.loads(capsys.readouterr().out)
    total, rows = found["total"], found["methods"]
    assert total["runs"] == sum(row["runs"] for row in rows) == 7
    assert total["hours"] == pytest.approx(sum(row["hours"] for row in rows))
    assert total["cost"] == pytest.approx(2 * total["hours"])
    assert found["rate"] == {"flops": 1e12, "evaluation_flops": 1e12, "assumed": False}
    assert sum(job["rule"] == "train" for job in found["to_run"]) == 6
    assert ended("plan", *where, "--tflops", "1") == 0
    text = f"{total['hours']:.3g}"
    assert any(line.split()[-3:-2] == [text] for line in capsys.readouterr().out.splitlines())


def test_run_passes_targets_settings_and_options_to_snakemake(monkeypatch):
    monkeypatch.chdir(ROOT)
    start = [sys.executable, "-m", "snakemake"]
    given = {"scale": "smoke", "results": "x"}
    composed = workflow.snakemake(["all"], given, 2, "gpus", ["-n"])
    own = ["--cores", "2", "--workflow-profile", "workflow/profiles/gpus", "-n"]
    assert composed == [*start, "all", *own, "--config", "scale=smoke", "results=x"]
    composed = workflow.snakemake(["tune"], {}, None, "slurm", ["--config", "seeds=2", "-n"])
    assert composed == [*start, "tune", "--profile", "slurm", "--config", "seeds=2", "-n"]
    composed = workflow.snakemake([], given, None, None, ["-n", "--config", "seeds=2"])
    assert composed[4:] == ["--config", "scale=smoke", "results=x", "seeds=2"]


def test_run_ends_with_snakemakes_exit_code():
    done = tafs("run", "--scale", "smoke", "--", "--version")
    assert (done.returncode, done.stdout) == (0, f"{version('snakemake')}\n")
    assert tafs("run", "--profile", "nowhere").returncode == 1


TABLES = {
    "gains": "row,variant,backbone,sampler,nfe,{iqm_all}\nOne,a,m,best,4,0.2,0.1,0.3,2,9,0\n",
    "table1": "row,variant,backbone,sampler,nfe,{clip}\nBase,base,m,ode,28,50,49,51,1,9,0\n",
    "table2": "row,variant,backbone,sampler,nfe,{clip},{jpeg}\n"
    "Base,base,m,ode,4,50,49,51,1,9,0,1,,,1,9,0\n"
    "Two,b,m,best,4,60.125,59,61,3,9,1,,,,1,9,0\nOne,a,m,best,4,55,54,56,3,9,0,3,,,1,9,0\n",
}


@pytest.fixture
def tables(tmp_path, monkeypatch) -> Path:
    """A folder with finished tables of known numbers."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "tables").mkdir()
    columns = {
        name: ",".join([name, *(f"{name}_{field}" for field in leaderboard.FIELDS[1:])])
        for name in ("iqm_all", "clip", "jpeg")
    }
    for name, text in TABLES.items():
        (tmp_path / "tables" / f"{name}.csv").write_text(text.format(**columns))
    return tmp_path


@pytest.mark.parametrize(
    "options, printed",
    [
        ([], ["rank system steps seeds iqm_all 95 % interval", "1 One 4 2 0.200 [0.100, 0.300]"]),
        (
            ["--metric", "clip"],  # of the tables that have it, the one with the most methods
            [
                "rank system steps seeds clip 95 % interval",
                "1 Two 4 3 60.12* [59.00, 61.00]",
                "2 One 4 3 55.00 [54.00, 56.00]",
                "3 Base 4 1 50.00 [49.00, 51.00]",
            ],
        ),
        (
            ["--table", "table2", "--metric", "jpeg"],  # Two has no value
            ["rank system steps seeds jpeg 95 % interval", "1 One 4 1 3.000", "2 Base 4 1 1.000"],
        ),
    ],
)
def test_the_leaderboard_sorts_by_a_metric(tables, capsys, options, printed):
    assert ended("leaderboard", str(tables), "--scale", "shapes", *options) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == printed


def test_compare_prints_a_table_and_its_numbers(tables, capsys):
    given = ("compare", str(tables), "--scale", "shapes")
    assert ended(*given, "--table", "table1") == 0
    _, head, row = capsys.readouterr().out.splitlines()
    assert (head.split(), row.split()) == (
        ["system", "steps", "clip"],
        ["Base", "28", "50.00", "[49.00,", "51.00]"],
    )
    assert ended(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"] == "gains" and found["rows"][0]["metrics"]["iqm_all"]["high"] == 0.3
    for options, said in (
        (["--table", "tabel1"], "has no 'tabel1'; did you mean 'table1'?"),
        (["--results", str(tables / "none")], "shapes/tables: holds no finished tables; `tafs run"),
    ):
        folder = [] if "--results" in options else [str(tables)]
        assert ended("compare", *folder, "--scale", "shapes", *options) == 2
        assert said in capsys.readouterr().err


def test_the_report_is_found_and_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = ("report", "--scale", "smoke", "--results", str(tmp_path))
    page = tmp_path / "smoke" / "report" / "index.html"
    assert ended(*given) == 2
    refusal = f"{page}: not built yet; `tafs run --scale smoke` builds it"
    assert capsys.readouterr().err == f"tafs report: {refusal}\n"
    page.parent.mkdir(parents=True)
    page.touch()
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o700)
    done = tafs(*given, "--open", BROWSER=str(browser))
    assert (done.returncode, done.stdout) == (0, f"{page}\n")
    assert (tmp_path / "opened").read_text() == f"{page.as_uri()}\n"


def test_samples_depend_on_the_seed_and_fill_a_labelled_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts.txt").write_text("two crosses\n")
    given = ["sample", "--model", "shapes-flux", "--prompt", "a red ring", "--steps", "1"]
    given += ["--steps", "4", "--sampler", "anneal", "--prompts", str(tmp_path / "prompts.txt")]
    grids = []
    for seed in ("3", "3", "4"):
        out = tmp_path / f"{len(grids)}.png"
        assert ended(*given, "--seed", seed, "--out", str(out)) == 0
        assert capsys.readouterr().out == f"{out}\n"
        grids.append(np.asarray(Image.open(out)))
    np.testing.assert_array_equal(grids[0], grids[1])
    assert (grids[0] != grids[2]).any()
    sampled = sample.of_model("shapes-flux", protocol.read("shapes"), None)
    found = sample.images(sampled, ["a red ring", "two crosses"], 4, "anneal", 3)
    assert found.shape == (2, 24, 24, 3)
    # The last cell of the grid, whose pixels are six wide, is the second prompt at four steps.
    cell = grids[0][-8 - 144 : -8, -8 - 144 : -8, :3]
    middle = cell[3 + 6 :: 6, 3 + 6 :: 6][:20, :20].astype(int)
    assert any(
        np.abs(middle - found[1, y : y + 20, x : x + 20].numpy()).max() <= 1
        for y in range(5)
        for x in range(5)
    )


def test_progress_is_drawn_on_terminals_only(monkeypatch, capsys):
    def work() -> None:
        with output.working():
            progress.tell("clip", 1, 4)
            progress.tell("clip", 3, 4)

    work()
    assert capsys.readouterr() == ("", "")
    shown, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        work()
    drawn = b""
    # One read returns what one write left; a closed terminal ends with EIO.
    with contextlib.suppress(OSError):
        while chunk := os.read(shown, 65536):
            drawn += chunk
    os.close(shown)
    assert b"clip" in drawn and b"3/4" in drawn
    assert capsys.readouterr().out == ""


def test_ctrl_c_ends_with_a_line_that_says_how_to_go_on(tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(ROOT)
    heard = []
    # A process that a shell starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt(name: str, done: int, total: int) -> None:
        heard.append((name, done, total))
        signal.raise_signal(signal.SIGINT)

    with progress.heard_by(interrupt):
        given = ["evaluate", "--base", "--model", "shapes-flux", "--protocol", "shapes"]
        assert ended(*given, "--results", str(tmp_path)) == 130
    again = "run the same command again: it continues from the scores that are saved"
    assert capsys.readouterr().err == f"tafs evaluate: interrupted; {again}\n"
    [(name, done, total)] = heard
    assert name.endswith(", 4 steps") and 0 < done <= total


def test_new_writes_the_stub_of_the_make_target(tmp_path):
    (tmp_path / "baselines").mkdir()
    done = tafs("new", "method", "my_method", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Wrote baselines/my_method.py. Test it")
    expected = method_template.TEMPLATE.replace("{title}", "MyMethod")
    assert (tmp_path / "baselines" / "my_method.py").read_text() == expected


def test_completion_knows_commands_scales_and_protocols():
    for words, expected in (
        ("tafs le", {"leaderboard"}),
        ("tafs plan --scale sm", {"smoke"}),
        ("tafs evaluate --protocol sha", {"shapes"}),
    ):
        own = {"_TAFS_COMPLETE": "complete_bash", "COMP_WORDS": words}
        done = tafs(**own, COMP_CWORD=str(len(words.split()) - 1))
        assert set(done.stdout.split()) == expected


def documented() -> list[list[str]]:
    """The commands of docs/command-line.md, as words."""
    blocks = (ROOT / "docs" / "command-line.md").read_text().split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tafs ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_every_documented_command_is_understood(monkeypatch, capsys):
    """Parsed as far as the call; those on the kept results are called."""
    from tafs.cli.app import app

    root = typer.main.get_command(app)
    found = documented()
    assert {words[0] for words in found if not words[0].startswith("-")} == {*COMMANDS}
    monkeypatch.chdir(ROOT)
    called = [words for words in found if "results/reference" in words]
    assert len(called) > 1 and all(ended(*words) == 0 for words in called)
    assert not set(capsys.readouterr().out) & set("\x1b─━│┃┏╭")
    for words in found:
        group: Any = root
        while words and words[0] in getattr(group, "commands", {}):
            group, words = group.commands[words[0]], words[1:]
        if group is not root:
            assert group.make_context("tafs", list(words)).command is group


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
    code, printed = shown("--json")
    assert (code, json.loads(printed.out)) == (0, [claim])
    code, printed = shown("--power")
    assert printed.out == "one: undecided\n  +0.5 +- 1.25  CLIP: a - b (open; 9 seeds)\n"
    file.write_text(json.dumps([claim | {"comparisons": [compared]}]))
    code, printed = shown("--power")
    assert code == 2 and "claims.json: not the claims of this version" in printed.err
