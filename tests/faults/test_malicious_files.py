"""Pickles that run code, in every place from which a file is loaded.

Each takes the place of a trusted file: loading it must fail with an expected error or ignore it.
The pickles, which create a folder, are written by hand, so that nothing here has to pickle.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support import synthetic, tiny_detector, tiny_pipelines, tiny_rewards

from tafs.assets import lockfile, sources
from tafs.data import prompts
from tafs.evaluation import image_archive
from tafs.experiment import claims, run_inputs, validate
from tafs.models import catalog, loading
from tafs.models.pipelines import ReferencePipeline
from tafs.report import figures, results
from tafs.rewards import golden
from tafs.rewards.clip import CLIPScore, PickScore
from tafs.rewards.detector import Mask2FormerDetector
from tafs.rewards.hpsv2 import HPSv2
from tafs.rewards.imagereward import ImageReward
from tafs.runtime import checkpoint, journal, progress
from tafs.runtime.run_dir import RunDir
from tafs.shapes import scorers, weights
from tafs.tracking import run_view

SMALL: dict[str, Any] = {"prompts": 12, "images": 1, "iterations": 2, "nfe": (4,)}
LOADING: dict[str, Any] = {"resolution": 64, "guidance": 3.5, "max_sequence_length": 16}
# Errors of a file with the wrong content; any other exception fails the test.
REFUSED = (ValueError, OSError, SafetensorError)


def raw(marker: Path) -> bytes:
    """`os.mkdir(marker)` as a pickle."""
    return f"cos\nmkdir\n(S'{marker}'\ntR.".encode()


def zipped(marker: Path) -> bytes:
    """The same in the format of torch.save."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", raw(marker))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def array(marker: Path) -> bytes:
    """The same in a .npy file of objects."""
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + "\n"
    length = len(header).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + header.encode() + raw(marker)


PAYLOADS: tuple[Callable[[Path], bytes], ...] = (raw, zipped, array)
LOADERS = (
    "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))",
    "import torch, sys; torch.load(sys.argv[1], weights_only=False)",
    "import numpy, sys; numpy.load(sys.argv[1], allow_pickle=True)",
)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_files_are_as_dangerous_as_they_should_be(tmp_path, kind, request):
    """Unpickling runs the code; otherwise the tests below would prove nothing."""
    if "torch" in LOADERS[kind] and not request.config.getoption("--torture"):
        pytest.skip("another process that imports torch")
    marker, file = tmp_path / "marker", tmp_path / "file"
    file.write_bytes(PAYLOADS[kind](marker))
    subprocess.run([sys.executable, "-c", LOADERS[kind], str(file)], check=False, timeout=120)
    assert marker.is_dir()


def attack(file: Path, payload: Callable[[Path], bytes], load: Callable[[], object]) -> None:
    """Load with the payload in place of the file; the code must not run."""
    marker = file.parent / "marker"
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(payload(marker))
    with suppress(*REFUSED):
        load()
    assert not marker.exists(), f"{file} was unpickled"
    file.unlink()
    if before is not None:
        file.write_bytes(before)


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(synthetic.write_run(tmp_path, "tafs_grpo", **SMALL))


@pytest.fixture
def base(tmp_path) -> RunDir:
    return RunDir(synthetic.write_run(tmp_path, "base", **SMALL))


def state(run: RunDir) -> Path:
    checkpoint.save(run.checkpoints, {}, 1, {"a": torch.zeros(2)}, {"seconds": 1.0})
    [generation] = run.checkpoints.iterdir()
    return generation


def rehashed(generation: Path) -> object:
    """Load a state after updating its manifest to its present files."""
    hashes = {
        name: hashlib.sha256((generation / name).read_bytes()).hexdigest()
        for name in (checkpoint.TENSORS, checkpoint.VALUES)
    }
    (generation / checkpoint.MANIFEST).write_text(json.dumps({"sha256": hashes}))
    return checkpoint.load(generation.parent, {})


def loads_of_a_run(run: RunDir, base: RunDir) -> Iterator[tuple[Path, Any]]:
    """Yield files and what reads them."""
    generation = state(run)
    for name in (checkpoint.TENSORS, checkpoint.VALUES, checkpoint.MANIFEST):
        yield generation / name, lambda: checkpoint.load(run.checkpoints, {})
    for name in (checkpoint.TENSORS, checkpoint.VALUES):
        yield generation / name, lambda: rehashed(generation)
    yield run.scores, lambda: results.read_scores(run.scores)
    yield run.served_scores, lambda: results.read_scores(run.scores, run.served_scores)
    steps = base.trajectory_rewards
    yield steps, lambda: results.read_trajectory_rewards(steps)
    view = run_view.read_run(run.folder)
    table = synthetic.loaded([base.folder, run.folder], figures={"images": "grid"})
    assert view is not None
    yield run.samples, lambda: list(run_view.sample_images(view))
    yield run.samples, lambda: figures.draw(table, run.folder)
    for name in ("run.json", "scores.parquet", "journal.jsonl", "served_scores.parquet"):
        yield run.folder / name, lambda: run_view.read_run(run.folder)
    yield run.folder / "run.json", lambda: run_inputs.run_spec(run)
    yield run.folder / "evaluation.json", lambda: run_inputs.eval_spec(run)
    yield run.journal, lambda: journal.read(run.journal)
    archive = run.folder / "0.zip"
    yield run.images, lambda: list(image_archive.read(run.images, 4))
    yield archive, lambda: list(image_archive.read(listed(run, archive), 4))
    yield run.folder / "report_spec.json", lambda: results.load(run.folder)
    shown = run.folder / progress.FOLDER / "train.json"
    shown.parent.mkdir()
    yield shown, lambda: progress.active(run.folder.parent, 0.0)
    stored = run.folder / "golden.json"
    yield stored, lambda: golden._read(stored)


def listed(run: RunDir, archive: Path) -> Path:
    image_archive.write_list(run.images, [archive])
    return run.images


def test_no_file_of_a_run_is_unpickled(run, base, trials):
    cases = [(file, load, p) for file, load in loads_of_a_run(run, base) for p in PAYLOADS]
    for number in trials("pickles: in a run's files", len(cases), len(cases)):
        file, load, payload = cases[number]
        attack(file, payload, load)


def test_no_image_of_an_archive_is_unpickled_and_none_is_unpacked(run):
    marker = run.folder / "marker"
    for member in ("0/ode/4/0/0.png", "../../0/ode/4/0/0.png"):
        with zipfile.ZipFile(run.folder / "0.zip", "w") as archive:
            archive.writestr(member, raw(marker))
        with pytest.raises(ValueError, match="0.zip: not an archive of images"):
            list(image_archive.read(listed(run, run.folder / "0.zip"), 4))
    assert not marker.exists()


def test_no_configuration_is_unpickled_or_runs_what_its_tags_name(tmp_path, trials):
    marker = tmp_path / "marker"
    tags = (
        f"!!python/object/apply:os.mkdir ['{marker}']",
        f"!!python/object/new:os.mkdir ['{marker}']",
        f"!!python/object/apply:builtins.exec ['import os; os.mkdir(\"{marker}\")']",
        "!!python/name:os.mkdir",
        "!!python/module:os",
    )
    texts = [payload(marker) for payload in PAYLOADS]
    texts += [form.replace(b"TAG", t.encode()) for t in tags for form in (b"a: TAG", b"- TAG")]
    yaml_readers = (validate.read, claims.read, lockfile.read, lockfile.read_lock)
    cases = list(itertools.product(texts, (*yaml_readers, catalog.read_file, prompts.read)))
    for number in trials("pickles: in what a person writes", len(cases), len(cases)):
        text, reader = cases[number]
        file = tmp_path / "file.yaml"
        file.write_bytes(text)
        with pytest.raises(ValueError) as caught:
            reader(file)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def test_no_embedded_model_is_unpickled(tmp_path, trials):
    """A pickle beside the weights is ignored, and one in their place refused."""
    root = tmp_path / "weights"
    shutil.copytree(weights.ROOT, root)
    marker = tmp_path / "marker"
    names = ("clip", "pickscore", "hpsv2", "imagereward")
    cases = [(n, p, kept) for n in names for p in PAYLOADS for kept in (True, False)]
    for number in trials("pickles: in place of embedded models", 2, len(cases)):
        name, payload, kept = cases[number * 7 % len(cases)]
        model = scorers.FusionScorer if name == "imagereward" else scorers.DualEncoder
        folder = root / name
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(payload(marker))
        if not kept:
            (folder / "model.safetensors").write_bytes(payload(marker))
            with pytest.raises(ValueError, match="altered"):
                weights.verify(name, root)
        with suppress() if kept else pytest.raises(Exception):  # noqa: B022
            model.load(folder)
        assert not marker.exists()
        (folder / "model.safetensors").write_bytes(whole)


def test_no_adapter_is_unpickled(tmp_path, trials):
    model = sources.of(synthetic.ASSETS).model("shapes-flux", 24)
    file = tmp_path / "adapter.safetensors"
    for number in trials("pickles: in place of an adapter", 3, 3):
        marker = tmp_path / "marker"
        file.write_bytes(PAYLOADS[number](marker))
        (tmp_path / "pytorch_lora_weights.bin").write_bytes(PAYLOADS[number](marker))
        with pytest.raises(ValueError, match="adapter.safetensors: ") as caught:
            model.load_adapter(file)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights and tokenizers."""
    suffixes = (".safetensors", ".pt", ".model", ".index.json")
    # Half-precision variants are not read.
    found = [f for f in sorted(folder.rglob("*")) if f.name.endswith(suffixes)]
    return [file for file in found if ".fp16" not in file.name]


def attack_a_folder(
    folder: Path, load: Callable[[], object], trial: int, *, beside: bool = False
) -> None:
    """Load with one weight file replaced by a pickle, or missing with pickles beside it."""
    marker = folder / "marker"
    files = weight_files(folder)
    file, payload = files[trial % len(files)], PAYLOADS[trial % len(PAYLOADS)]
    names = [f"{file.stem}{suffix}" for suffix in (".bin", ".pt", ".ckpt", ".pth", ".pkl")]
    names += ["pytorch_model.bin", "diffusion_pytorch_model.bin", "tf_model.h5", "model.ckpt"]
    others = [other for other in map(file.with_name, names) if not other.exists()]
    whole = file.read_bytes()
    if beside:
        file.unlink()
    for place in others if beside else [file]:
        place.write_bytes(payload(marker))
    refused = True
    with suppress(Exception):  # of many classes; only the code must not run
        load()
        refused = False
    assert not marker.exists(), f"{file} was unpickled"
    assert refused or file.suffix != ".safetensors"
    file.write_bytes(whole)
    for other in others:
        other.unlink(missing_ok=True)


PIPELINES = ("flux", "sd3", "sana", "hidream")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Callable[[str], tuple[Path, Callable[[], object]]]:
    """Return a tiny pipeline and what loads it; each is created on first use."""
    root = tmp_path_factory.mktemp("pipelines")
    known = catalog.read()

    def ask(name: str) -> tuple[Path, Callable[[], object]]:
        folder = root / name
        if not folder.exists():
            getattr(tiny_pipelines, name)(folder)
        if name in ("flux", "sd3"):
            return folder, lambda: loading.load(folder, **LOADING)
        model = known[{"sana": "sana-1-5", "hidream": "hidream-full"}[name]]
        folders = {model.resource: folder}
        if model.text_encoder:
            folders[model.text_encoder] = root / "llama"
            if not (root / "llama").exists():
                tiny_pipelines.llama(root / "llama")
        return folder, lambda: ReferencePipeline.load(model, folders, resolution=64)

    return ask


def test_no_pipeline_is_unpickled(pipelines, trials):
    for number in trials("pickles: in place of a pipeline's weights", 1, 40):
        folder, load = pipelines(PIPELINES[number % len(PIPELINES)])
        attack_a_folder(folder, load, number // len(PIPELINES), beside=number % 8 >= 4)


def test_no_python_file_of_a_pipeline_is_run(pipelines, trials, tmp_path):
    """Pipelines and tokenizers may name classes in files beside them; none is imported."""
    for number in trials("code: a pipeline's own classes", 0, 4):
        source, _ = pipelines(("flux", "sd3")[number % 2])
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        marker = tmp_path / "marker"
        code = f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    pass\n"
        for place in (folder, folder / "transformer", folder / "tokenizer"):
            (place / "evil.py").write_text(code)
        index = json.loads((folder / "model_index.json").read_text())
        if number < 2:
            index["transformer"] = ["evil", "Evil"]
        else:
            tokenizer = folder / "tokenizer" / "tokenizer_config.json"
            described = json.loads(tokenizer.read_text())
            described["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
            tokenizer.write_text(json.dumps(described))
        (folder / "model_index.json").write_text(json.dumps(index))
        with suppress(Exception):  # refused, or a known class is used
            loading.load(folder, **LOADING)
        assert not marker.exists()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Callable[[str], tuple[Path, Callable[[], object]]]:
    root = tmp_path_factory.mktemp("rewards")
    tiny_rewards.clip(root / "clip")

    def imagereward(folder: Path) -> None:
        tiny_rewards.bert_tokenizer(root / "bert")
        tiny_rewards.imagereward(folder, root / "bert")

    hpsv2, image_reward, med = "HPS_v2.1_compressed.pt", "ImageReward.pt", "med_config.json"
    known: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
        "clip": (tiny_rewards.clip, CLIPScore),
        "pickscore": (tiny_rewards.pickscore, lambda f: PickScore(f, root / "clip")),
        "hpsv2": (lambda f: tiny_rewards.hpsv2(f / hpsv2), lambda f: HPSv2(f / hpsv2)),
        "mask2former": (tiny_detector.mask2former, lambda f: Mask2FormerDetector(f, root / "clip")),
        "imagereward": (
            imagereward,
            lambda f: ImageReward(f / image_reward, f / med, root / "bert"),
        ),
    }

    def ask(name: str) -> tuple[Path, Callable[[], object]]:
        folder, (make, load) = root / name, known[name]
        if not folder.exists():
            make(folder)
        return folder, lambda: load(folder)

    return ask


REWARDS = ("clip", "hpsv2", "pickscore", "imagereward", "mask2former")


def test_no_reward_is_unpickled(rewards, trials):
    for number in trials("pickles: in place of a reward's weights", 2, 30):
        folder, load = rewards(REWARDS[number % len(REWARDS)])
        attack_a_folder(folder, load, number // len(REWARDS), beside=number >= 15)


def test_tensors_in_a_checkpoint_do_not_hide_code_beside_them(tmp_path):
    """A complete state dict, followed by code."""
    file, marker = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "marker"
    tiny_rewards.hpsv2(file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in members if name.endswith("data.pkl")]
    # The state dict is built and dropped, then the code runs.
    members[pickled] = members[pickled].removesuffix(b".") + b"0" + raw(marker)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="reward hpsv2: .* is damaged") as caught:
        HPSv2(file)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
