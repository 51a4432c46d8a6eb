"""A scale with downloads on a laptop: a tiny random checkpoint for each entry of resources.yaml.

    PYTHONPATH=tests python tests/support/tiny_hub.py [OPTION ...] FOLDER [EXPERIMENT ...]

copies the project to FOLDER with a small SCALE (`paper` by default), pins and fetches its resources
from a hub on 127.0.0.1 with the real client, and runs `snakemake all --config scale=SCALE` there:
all jobs of the real graph, or those of some experiments. Layouts, file names, configuration fields
and tensor names are the published ones.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401 - before anything imports torchvision

# isort: split
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from support import tiny_detector, tiny_pipelines, tiny_rewards
from support.hub import Hub

from tafs.assets import lockfile
from tafs.common import yaml_files

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    *("config.yaml", "claims.yaml", "resources.yaml", "environment.yml", "pyproject.toml"),
    *("setup.py", "README.md", "workflow", "tafs", "baselines"),
)
STEPS = 4  # largest number of steps of a model
PICKAPIC = (40, 8)  # training and test prompts
# Small sizes and budgets, on a CPU.
SCALE: Mapping[str, Any] = {
    "device": "cpu",
    "memory_mb": 1500,
    "resolution": 64,
    "iterations": 2,
    "prompts_per_iteration": 6,
    "group_size": 2,
    "micro_batch": 2,
    "checkpoint_every": 1,
    "lora": {"rank": 4, "alpha": 8},
}
EVALUATION: Mapping[str, Any] = {
    "images_per_prompt": 1,
    "prompts": 2,
    "base_nfe": 6,
    "curve_nfe": [1, 4],
    "correlation_prompts": 12,
    "validation_prompts": 2,  # of three samplers, at every number of steps
    "batch": 6,
    "resolution": 64,
}
SERVER = [sys.executable, str(ROOT / "tests" / "support" / "chat_server.py"), "{port}"]


def unread(folder: Path, files: Mapping[str, str], weights: str = "model") -> None:
    """A model whose content only a server would read."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    save_file({"weight": torch.zeros(4)}, folder / f"{weights}.safetensors")


def unifiedreward(folder: Path) -> None:
    """CodeGoat24/UnifiedReward-7b-v1.5."""
    config = '{"architectures": ["LlavaQwenForCausalLM"]}'
    files = {"config.json": config, "merges.txt": "#version: 0.2\n"}
    unread(folder, files, weights="model-00001-of-00001")


def pickapic(folder: Path) -> None:
    """yifan123/flow_grpo's prompt files."""
    place = folder / "dataset" / "pickscore"
    place.mkdir(parents=True)
    for split, count in zip(("train", "test"), PICKAPIC, strict=True):
        lines = [f"a {split} painting of {number} foxes in the snow" for number in range(count)]
        (place / f"{split}.txt").write_text("\n".join(lines) + "\n")


def imagereward(folder: Path) -> None:
    tokenizer = folder.with_name("bert-for-imagereward")
    tiny_rewards.bert_tokenizer(tokenizer)
    tiny_rewards.imagereward(folder, tokenizer)
    shutil.rmtree(tokenizer)


def bert(folder: Path) -> None:
    tiny_rewards.bert_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')


def hpsv3(folder: Path) -> None:
    tokenizer = folder.with_name("qwen2-vl-for-hpsv3")
    tiny_rewards.hpsv3(folder / "HPSv3.safetensors", tiny_rewards.qwen2_vl(tokenizer))
    shutil.rmtree(tokenizer)


def qwen3_vl(folder: Path) -> None:
    """Qwen/Qwen3-VL-8B-Instruct, of which only the tokenizer is read here."""
    files = {"config.json": "{}", "merges.txt": "#version: 0.2\n"}
    unread(folder, files, weights="model-00001-of-00001")
    tiny_rewards.qwen_tokenizer(folder)


def geneval2(folder: Path) -> None:
    """Lines of the form of facebookresearch/GenEval2's."""
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt": f"{number} {colour} kites",
            "atom_count": atoms,
            "vqa_list": [["How many kites are in the image?", number]]
            + [["Are the kites green?", "Yes"]] * (atoms - 1),
        }
        for number, colour, atoms in (("two", "green", 2), ("three", "light green", 3))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "geneval2_data.jsonl").write_text(text)


def clip_h(folder: Path) -> None:
    tiny_rewards.clip_processor(folder)
    (folder / "config.json").write_text('{"model_type": "clip"}')


WRITERS: Mapping[str, Callable[[Path], object]] = {
    **tiny_pipelines.RESOURCES,
    "pickscore": tiny_rewards.pickscore,
    "clip-vit-h-14": clip_h,
    "clip-vit-l-14": tiny_rewards.clip,
    "hpsv2": lambda folder: tiny_rewards.hpsv2(folder / "HPS_v2.1_compressed.pt"),
    "imagereward": imagereward,
    "bert-base-uncased": bert,
    "mask2former": tiny_detector.mask2former,
    "hpsv3": hpsv3,
    "qwen2-vl-7b": tiny_rewards.qwen2_vl,
    "unifiedreward": unifiedreward,
    "unifiedreward-2": unifiedreward,
    "qwen3-vl-8b": qwen3_vl,
    "geneval2": geneval2,
    "siglip": lambda folder: unread(folder, {"config.json": "{}", "spiece.model": "pieces"}),
    "pickapic": pickapic,
}


def folders(root: Path) -> Callable[[str], Path]:
    """A function from a resource to its tiny checkpoint below `root`, which is written once."""

    @functools.cache
    def written(resource: str) -> Path:
        if resource not in WRITERS:
            pytest.skip(f"no tiny checkpoint of {resource}")
        WRITERS[resource](root / resource)
        return root / resource

    return written


def write(folder: Path) -> Path:
    """Write every repository of resources.yaml into a hub's folder."""
    for name, resource in lockfile.read(ROOT / "resources.yaml").items():
        place = folder / resource.hub if resource.hub else folder / "github" / str(resource.github)
        WRITERS[name](place)
    return folder


def configure(
    file: Path,
    experiments: Sequence[str],
    methods: Sequence[str] = (),
    name: str = "paper",
    processes: int = 1,
) -> str:
    """The text of config.yaml with a small scale `name` and some experiments and methods.

    Args:
        processes: the largest number that train a run, and the number that judge it. Each loads
            all models, which takes longer here than a few images.
    """
    content = yaml_files.load_yaml(file, dict)
    scale = content["scales"][name]
    scale |= SCALE | {"processes": min(scale["processes"], processes)}
    scale["methods"].setdefault("mix_grpo", {})["interval"] = 1  # fewer than the iterations
    evaluation = scale["evaluation"]
    evaluation |= EVALUATION | {"processes": processes}
    evaluation |= {"server": SERVER} if "server" in evaluation else {}
    if experiments:
        scale["experiments"] = list(experiments)
    if methods:
        scale["exclude_methods"] = [name for name in content["methods"] if name not in methods]
    return _text(content)


def _text(content: Mapping[str, Any]) -> str:
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(content, out)
    return out.getvalue()


def project(
    folder: Path,
    experiments: Sequence[str] = (),
    methods: Sequence[str] = (),
    name: str = "paper",
    processes: int = 1,
) -> Path:
    """Copy the project with a small scale `name`; see `configure`."""
    copy(folder)
    file = folder / "config.yaml"
    file.write_text(configure(file, experiments, methods, name, processes))
    file = folder / "tafs" / "models" / "models.yaml"
    models = yaml_files.load_yaml(file, dict)
    for model in models.values():
        model["steps"] = min(model["steps"], STEPS)
    file.write_text(_text(models))
    return folder


def copy(folder: Path) -> None:
    """Copy the files that the graph needs; weights are linked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
        else:
            ignored = shutil.ignore_patterns("__pycache__", "weights")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    weights = folder / "tafs/shapes/weights"
    if not weights.exists():
        weights.symlink_to(ROOT / "tafs/shapes/weights")


def environment(folder: Path, hub: Hub) -> dict[str, str]:
    """The environment of commands in the copy: its own code and cache, and the hub."""
    programs = Path(sys.executable).parent
    return hub.environment(
        HF_HOME=str(folder / "huggingface"),
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHONPATH=str(folder),
        OMP_NUM_THREADS="1",
    )


def run(folder: Path, scale: str, experiments: Sequence[str], processes: int) -> int:
    """Run everything; return the exit code of the first failed command, or 0."""
    project(folder, experiments, name=scale, processes=processes)
    repositories = folder / "hub"
    if not repositories.exists():
        write(repositories)
    with Hub(repositories) as hub:
        around = environment(folder, hub)
        for command in (
            ["python", "-m", "tafs.assets.download", "lock", "--random-weights"],
            ["snakemake", "all", "--config", f"scale={scale}"],
        ):
            done = subprocess.run(command, cwd=folder, env=around, check=False)
            if done.returncode:
                return done.returncode
    return 0


def main() -> None:
    parser = argparse.ArgumentParser("python tests/support/tiny_hub.py")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="for the copy of the project")
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="*", help="default: all")
    parser.add_argument("--scale", default="paper", help="default: %(default)s")
    help_ = "that train or judge a run together; default: %(default)s"
    parser.add_argument("--processes", type=int, default=1, help=help_)
    given = parser.parse_intermixed_args()
    sys.exit(run(given.folder.resolve(), given.scale, given.experiments, given.processes))


if __name__ == "__main__":
    main()
