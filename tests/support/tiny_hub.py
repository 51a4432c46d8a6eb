"""The paper's scale on a laptop: every repository of resources.yaml with a tiny random checkpoint.

    python tests/support/tiny_hub.py FOLDER [EXPERIMENT ...]

makes FOLDER a copy of the project whose scale `paper` is small, locks and fetches its resources
from a hub on 127.0.0.1 with the real client, and runs `snakemake all --config scale=paper` there:
every job of the real graph, or of some of its experiments. Layouts, file names, configuration
fields and tensor names are the published ones; so is the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401 - before anything imports torchvision

# isort: split
import torch
import yaml
from safetensors.torch import save_file
from support import tiny_detector, tiny_pipelines, tiny_rewards
from support.hub import Hub

from tafs.assets import lockfile
from tafs.common import yaml_files

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    *("config.yaml", "claims.yaml", "resources.yaml", "environment.yml", "pyproject.toml"),
    *("workflow", "tafs", "baselines"),
)
STEPS = 4  # of every model at the most
PICKAPIC = (40, 8)  # training and test prompts
# What is small about the scale: sizes and budgets, and that the GPU is a processor.
SCALE: Mapping[str, Any] = {
    "device": "cpu",
    "processes": 2,
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
    "batch": 6,
    "resolution": 64,
    "server": [sys.executable, str(ROOT / "tests" / "chat_server.py"), "{port}"],
}


def unifiedreward(folder: Path) -> None:
    """CodeGoat24/UnifiedReward-7b-v1.5, of which only the server reads more than the names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlavaQwenForCausalLM"]}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    save_file({"weight": torch.zeros(4)}, folder / "model-00001-of-00001.safetensors")


def siglip(folder: Path) -> None:
    """google/siglip-so400m-patch14-384, the same."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "spiece.model").write_bytes(b"pieces")
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")


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
    "unifiedreward": unifiedreward,
    "siglip": siglip,
    "pickapic": pickapic,
}


def write(folder: Path) -> Path:
    """A hub's folder with every repository of resources.yaml."""
    for name, resource in lockfile.read(ROOT / "resources.yaml").items():
        place = folder / resource.hub if resource.hub else folder / "github" / str(resource.github)
        WRITERS[name](place)
    return folder


def configure(file: Path, experiments: Sequence[str], methods: Sequence[str] = ()) -> str:
    """config.yaml with a small scale `paper`, of these experiments and methods or of all."""
    content = yaml_files.load_yaml(file, dict)
    scale = content["scales"]["paper"]
    scale |= SCALE
    scale["evaluation"] |= EVALUATION
    if experiments:
        scale["experiments"] = list(experiments)
    if methods:
        scale["without"] = [name for name in content["methods"] if name not in methods]
    return yaml.safe_dump(content, sort_keys=False)


def project(folder: Path, experiments: Sequence[str] = (), methods: Sequence[str] = ()) -> Path:
    """A copy of the project whose scale `paper` is small; see `configure`."""
    copy(folder)
    file = folder / "config.yaml"
    file.write_text(configure(file, experiments, methods))
    file = folder / "tafs" / "models.yaml"
    models = yaml_files.load_yaml(file, dict)
    for model in models.values():
        model["steps"] = min(model["steps"], STEPS)
    file.write_text(yaml.safe_dump(models, sort_keys=False))
    return folder


def copy(folder: Path) -> None:
    """What the graph needs of the project."""
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
    """For commands in the copy: its own code, the hub and a cache of its own."""
    programs = Path(sys.executable).parent
    return hub.environment(
        HF_HOME=str(folder / "huggingface"),
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHONPATH=str(folder),
        OMP_NUM_THREADS="1",
    )


def run(folder: Path, *experiments: str) -> int:
    """Everything; the exit code of the command that failed, or 0."""
    project(folder, experiments)
    repositories = folder / "hub"
    if not repositories.exists():
        write(repositories)
    with Hub(repositories) as hub:
        around = environment(folder, hub)
        for command in (
            ["python", "-m", "tafs.assets.download", "lock", "--random-weights"],
            ["snakemake", "all", "--config", "scale=paper"],
        ):
            done = subprocess.run(command, cwd=folder, env=around, check=False)
            if done.returncode:
                return done.returncode
    return 0


def main() -> None:
    if len(sys.argv) < 2:
        print("usage: python tests/support/tiny_hub.py FOLDER [EXPERIMENT ...]", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(Path(sys.argv[1]).resolve(), *sys.argv[2:]))


if __name__ == "__main__":
    main()
