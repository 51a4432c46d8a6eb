"""The stub that `make new-method` writes is a method like any other."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.toy import toy_run, toy_trainer
from test_method import assert_costs_what_it_says

from tafs.methods import base, registry, template

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stub(tmp_path, monkeypatch) -> str:
    """A fresh method in a folder of its own, found under its name."""
    template.write("my_method", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    monkeypatch.setattr(base, "sources", lambda: {"my_method": "my_method"})
    return "my_method"


def test_the_stub_trains(stub):
    run = toy_trainer(toy_run(stub))
    first = run.iterate(0)["rewards"]["clip"][-1]
    for iteration in range(1, 30):
        last = run.iterate(iteration)["rewards"]["clip"][-1]
    assert last > first + 0.3


def test_the_stub_costs_what_it_says(stub):
    run = toy_trainer(toy_run(stub))
    assert_costs_what_it_says(run)
    assert run.method.forward_equivalents == 6 + 3 * 5


def test_the_stub_is_clean_code(tmp_path):
    file = template.write("my_method", tmp_path)
    programs = Path(sys.executable).parent
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [programs / "ruff", *command, "--config", ROOT / "pyproject.toml", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "My", "a-b", "../x", "a b", "x" * 65, "1a"])
def test_a_name_that_cannot_be_a_key_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name"):
        template.write(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tafs_grpo", "flow_grpo", "base"])
def test_a_taken_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is taken"):
        template.write(name, tmp_path)


def test_installed_packages_bring_methods_by_entry_point(tmp_path, monkeypatch):
    file = template.write("their_method", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("their_method", "their_method:METHOD", "tafs.methods")
    monkeypatch.setattr(base, "installed", lambda: (point,))
    assert registry.source_file("their_method") == file
    assert registry.create("their_method", {}).nfe_theta == 5


def test_a_name_that_two_packages_claim_is_refused(monkeypatch):
    point = EntryPoint("flow_grpo", "elsewhere.flow:METHOD", "tafs.methods")
    monkeypatch.setattr(base, "installed", lambda: (point,))
    with pytest.raises(ValueError, match="'flow_grpo' is defined twice: .*elsewhere.flow"):
        registry.sources()
