"""The recorded commit is that of the project's own checkout, or none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tafs.training import provenance

UNKNOWN = {"git_commit": None, "git_changed": None}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_checkouts_commit_and_changes_are_recorded(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.code(checkout) == {"git_commit": commit, "git_changed": False}
    (checkout / "notes.txt").write_text("untracked files do not count")
    assert provenance.code(checkout)["git_changed"] is False
    (checkout / "code.py").write_text("x = 2\n")
    assert provenance.code(checkout) == {"git_commit": commit, "git_changed": True}


def test_an_archive_inside_another_repository_has_no_commit(checkout):
    (checkout / "project").mkdir()
    assert provenance.code(checkout / "project") == UNKNOWN


def test_git_variables_do_not_name_another_repository(checkout, tmp_path, monkeypatch):
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(unpacked))
    assert provenance.code(unpacked) == UNKNOWN
    assert provenance.code(checkout)["git_commit"]


def test_a_checkout_that_git_does_not_answer_for_has_no_commit(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.code(checkout) == UNKNOWN
    (tmp_path / "git").write_text("#!/bin/sh\nexit 128\n")  # another user's checkout
    (tmp_path / "git").chmod(0o755)
    assert provenance.code(checkout) == UNKNOWN
