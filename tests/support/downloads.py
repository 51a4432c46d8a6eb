"""A project whose resources are pinned and fetched from a hub on 127.0.0.1; pytest fixtures."""

from __future__ import annotations

import hashlib
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML
from support.hub import Faults, Hub

from tafs.assets import lockfile

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TOKEN = "hf_accepted"
# Larger than the 10 MiB that the client writes at once, so that downloads can be resumed.
LARGE = hashlib.shake_256(b"weights").digest(11_000_000)
PIPE = {
    "model_index.json": b'{"_class_name": "FluxPipeline"}\n',
    "transformer/config.json": b"{}\n",
    WEIGHTS: LARGE,
}
# Files of the real repository; False: another copy of the weights, which diffusers does not need.
_SPLIT = ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors")
_SD35 = {
    **{"model_index.json": True, "scheduler/scheduler_config.json": True, "vae/config.json": True},
    **{f"text_encoder{n}/config.json": True for n in ("", "_2", "_3")},
    **{f"text_encoder{n}/model.safetensors": True for n in ("", "_2")},
    **{f"text_encoder{n}/model.fp16.safetensors": False for n in ("", "_2")},
    **{f"text_encoder_3/model{part}": True for part in (*_SPLIT, ".safetensors.index.json")},
    **{f"text_encoder_3/model.fp16{part}": False for part in _SPLIT},
    **{"sd3.5_large.safetensors": False, "text_encoders/t5xxl_fp16.safetensors": False},
    **{f"tokenizer/{name}.json": True for name in ("special_tokens_map", "tokenizer_config")},
    **{"tokenizer/vocab.json": True, "tokenizer/merges.txt": True},
    **{"tokenizer_3/spiece.model": True, "tokenizer_3/tokenizer.json": True},
    **{f"{WEIGHTS.removesuffix('.safetensors')}{part}": True for part in _SPLIT},
    **{f"{WEIGHTS}.index.json": True, "transformer/config.json": True},
    "vae/diffusion_pytorch_model.safetensors": True,
}
SD35 = dict(sorted(_SD35.items()))
REPOSITORIES = {
    "owner/pipe": {**PIPE, "flux1-dev.safetensors": b"the same in one file"},
    "owner/closed": {"config.json": b"{}", "model.safetensors": b"closed"},
    "datasets/owner/words": {"words.txt": b"a cat\n", "labels.txt": b"cat\n"},
    "github/owner/code": {"data/train.txt": b"a dog\n", "data/test.txt": b"a bird\n"},
    "stabilityai/stable-diffusion-3.5-large": {name: name.encode() for name in SD35},
}


def entry(files: list[str], **where: str) -> dict[str, object]:
    facts = {"licence": "MIT", "gated": False, "gigabytes": 0.01, "used_for": "tests"}
    return {**where, "files": files, **facts}


RESOURCES = {
    "pipe": entry([*list(PIPE)[:2], "transformer/*model[.-][0s]*"], hub="owner/pipe"),
    "closed": entry(["*"], hub="owner/closed"),
    "words": entry(["words.txt"], hub="owner/words", type="dataset"),
    "code": entry(["data/train.txt", "data/test.txt"], github="owner/code"),
    "sd35-large": lockfile.read(ROOT / "resources.yaml")["sd35-large"].model_dump(
        mode="json", exclude_none=True
    ),
}


@dataclass
class Project:
    """A working folder with resources.yaml, a lock file and a Hugging Face cache."""

    folder: Path
    home: Path
    hub: Hub

    @property
    def lock(self) -> Path:
        return self.folder / "resources.lock.yaml"

    def run(self, *arguments: str, limit: int | None = None, **environment: str):
        """Run the command; files can have at most `limit` bytes."""
        done = subprocess.run(
            [sys.executable, "-m", "tafs.assets.download", *arguments],
            cwd=self.folder,
            env=self.hub.environment(**{"HF_HOME": str(self.home), **environment}),
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    def failures(self, *arguments: str, code: int = 1, **options) -> dict[str, str]:
        """Run the command, which exits with `code`; its message for each resource."""
        done = self.run(*arguments, **options)
        assert done.returncode == code, done.stderr
        said = (line.partition(": ") for line in done.stderr.splitlines())
        known = {*RESOURCES, "gone", "typo", "nowhere", "busy", f"resources {arguments[0]}"}
        return {name: text for name, _, text in said if name in known}

    def succeed(self, *arguments: str, **options) -> str:
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout


def write_yaml(file: Path, content: object) -> None:
    with file.open("w") as out:
        YAML(typ="safe", pure=True).dump(content, out)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The running hub."""
    folder = tmp_path_factory.mktemp("hub")
    for repository, files in REPOSITORIES.items():
        for name, data in files.items():
            file = folder / repository / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    with Hub(folder) as running:
        reset(running)
        yield running


def reset(running: Hub) -> None:
    running.faults = Faults(
        gated={"owner/closed"}, accepted_tokens={TOKEN}, known_tokens={"hf_other"}
    )
    running.requests.clear()


@pytest.fixture(scope="module")
def locked(served, tmp_path_factory) -> Project:
    """A project with all resources pinned."""
    folder = tmp_path_factory.mktemp("locked")
    project = Project(folder, folder / "home", served)
    write_yaml(folder / "resources.yaml", RESOURCES)
    project.succeed("lock", HF_TOKEN=TOKEN)
    return project


@pytest.fixture
def project(locked, tmp_path, monkeypatch) -> Project:
    """A copy of `locked` without downloads; this process uses its cache and folder."""
    for file in ("resources.yaml", "resources.lock.yaml"):
        shutil.copy(locked.folder / file, tmp_path)
    reset(locked.hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return Project(tmp_path, tmp_path / "home", locked.hub)


@pytest.fixture(scope="module")
def fetched_once(locked) -> Project:
    """A project with all resources fetched, whose cache tests copy."""
    folder = locked.folder / "fetched"
    folder.mkdir()
    shutil.copy(locked.lock, folder)
    project = Project(folder, folder / "home", locked.hub)
    reset(locked.hub)
    project.succeed("fetch", HF_TOKEN=TOKEN)
    return project


@pytest.fixture
def fetched(project, fetched_once) -> Project:
    shutil.copytree(fetched_once.home, project.home, symlinks=True)
    return project


def got(running: Hub) -> set[str]:
    """The files downloaded since the hub's last reset."""
    found = (re.search(r"/resolve/\w+/(.+)", r.path) for r in running.requests if r.method == "GET")
    return {match[1] for match in found if match}
