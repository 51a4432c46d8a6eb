"""Weights with one altered bit and unlisted files are refused before they are loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.downloads import fetched, fetched_once, locked, project, served  # noqa: F401

from tafs import experiment
from tafs.assets import cache, lockfile
from tafs.shapes import weights

ROOT = Path(__file__).resolve().parents[2]
LISTED = sorted(json.loads((weights.ROOT / weights.MANIFEST).read_text()))


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(weights.ROOT, tmp_path / "weights"))


def alter(file: Path, rng: random.Random) -> None:
    """Flip one bit and restore the file's times."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_altered_shipped_file_is_refused(copied, trials):
    rng = random.Random(0)
    order = rng.sample(LISTED, len(LISTED))
    for number in trials("weights: one byte altered, shipped", 5, max(100, len(LISTED))):
        file = copied / order[number % len(order)]
        model = order[number % len(order)].split("/")[0]  # the folder that is verified
        whole = file.read_bytes()
        alter(file, rng)
        with pytest.raises(ValueError) as caught:
            weights.verify(model, copied)
        assert str(caught.value) == f"{file}: altered; restore it with `git checkout -- {file}`"
        file.write_bytes(whole)
        weights.verify(model, copied)


INTRUDERS = (
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.bin",
    "tokenizer/tokenizer.py",
    "adapter_config.json",
)


def test_an_unlisted_shipped_file_is_refused(copied, trials):
    for number in trials("weights: a file beside them, shipped", 2, 2 * len(INTRUDERS)):
        model = ("shapes-flux", "shapes-sd3")[number % 2]
        file = copied / model / INTRUDERS[number // 2]
        file.write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"not listed in .*manifest.json; delete it"):
            weights.verify(model, copied)
        file.unlink()


def test_an_altered_downloaded_file_is_refused(fetched, trials):  # noqa: F811
    rng = random.Random(1)
    entries = lockfile.read_lock()
    files = [(name, file) for name, entry in entries.items() for file in entry.files]
    order = rng.sample(files, len(files))
    for number in trials("weights: one byte altered, fetched", 5, 100):
        name, inside = order[number % len(order)]
        file = cache.path(name) / inside
        whole = file.read_bytes()
        alter(file, rng)
        with pytest.raises(ValueError) as caught:
            cache.path(name)
        said = str(caught.value)
        assert said.startswith(f"{file} is altered: has SHA-256 ")
        assert f"and run `python -m tafs.assets.download fetch {name}`" in said
        file.write_bytes(whole)
        cache.path(name)
    assert fetched.hub.requests == []


STAGES = (
    ("training.train", "shapes-flux/transformer/diffusion_pytorch_model.safetensors"),
    ("evaluation.evaluate", "hpsv2/model.safetensors"),
    ("evaluation.trajectory_rewards", "shapes-flux/vae/diffusion_pytorch_model.safetensors"),
    ("training.train", "pickscore/model.safetensors"),
    ("evaluation.evaluate", "shapes-flux/model_index.json"),
    ("evaluation.trajectory_rewards", "imagereward/tokenizer.json"),
)


def test_every_stage_verifies_what_it_loads(tmp_path, trials):
    """The files may have been altered after the workflow was planned."""
    for name in ("tafs", "baselines"):
        shutil.copytree(ROOT / name, tmp_path / name)
    plan = experiment.load({"scale": "smoke"}, ROOT / "config.yaml")
    rng = random.Random(2)
    for number in trials("weights: one byte altered, before each stage", 0, len(STAGES)):
        module, altered = STAGES[number]
        stage = module.split(".")[1]
        trained = "tafs_grpo.preference.shapes-flux.0"
        name = trained if stage == "train" else "base.shapes.shapes-flux"
        folder = tmp_path / str(number) / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(plan.runs[name].to_json())
        (folder / "evaluation.json").write_text(plan.evaluations[name].to_json())
        file = tmp_path / "tafs/shapes/weights" / altered
        whole = file.read_bytes()
        alter(file, rng)
        done = subprocess.run(
            [sys.executable, "-m", f"tafs.{module}", str(folder)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == (
            f"{stage} {folder}: {file}: altered; restore it with `git checkout -- {file}`"
        )
        left = {f.name for f in folder.iterdir() if not f.name.startswith(".")}
        assert left == {"run.json", "evaluation.json"}
        file.write_bytes(whole)
