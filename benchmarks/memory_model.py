"""Compare the predicted memory of a training (tafs/models/memory_model.py) with measured peaks.

    python benchmarks/memory_model.py

prints a Markdown table of the measurements of results/reference/gpu/: predicted and measured GB,
and the largest difference in per cent of the measured value. Equal measurements share a row.

The measured models are those of benchmarks/rehearse.py, and three things follow from that: the
reward models are the rehearsal's; Stable Diffusion 3's table of positions also exists in float32,
which a loaded model drops; and an iteration ends before AdamW's moments are used again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import torch
from rehearse_models import SIZES
from transformers import CLIPConfig, CLIPModel

from tafs import experiment
from tafs.common import errors
from tafs.methods import registry
from tafs.models import architectures, catalog, flops, memory_model
from tafs.models.memory_model import FLOAT, HALF, Setting

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "reference" / "gpu"
FULL = SIZES["full"]
RANK = 32
# The measurements do not name the number of images that were decoded; these are the micro-batch and
# the batch of evaluation in config.yaml.
DECODED = {"decode 512 bf16": (512, 12), "decode 1024 fp32": (1024, 4)}


@dataclass(frozen=True)
class Measurement:
    """One line of a file: its model, what was measured, its peak in GB and the predicted one."""

    model: str
    case: str
    measured: float
    predicted: float


def reward_weights() -> float:
    """Bytes of the rehearsal's reward models."""
    total = 0.0
    for settings in FULL.rewards.values():
        with flops.made_on(flops.META, torch.float32):
            model = CLIPModel(CLIPConfig(**settings))
        total += FLOAT * sum(parameter.numel() for parameter in model.parameters())
    return total


def reward_activations() -> float:
    """Bytes per image that the gradients of the rehearsal's reward models need."""
    total = 0.0
    for settings in FULL.rewards.values():
        vision = settings["vision_config"]
        total += memory_model.tower(
            vision["hidden_size"],
            vision["num_hidden_layers"],
            (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            quick_gelu=vision["hidden_act"] == "quick_gelu",
        )
    return total


class Comparison:
    """Predictions of what was measured."""

    def __init__(self) -> None:
        plan = experiment.load({"scale": "paper"}, ROOT / "config.yaml")
        self.roles = plan.config.active.model_roles | {"klein": "flux2-klein-base-4b"}
        self.architectures = {**FULL.backbones, "klein": architectures.FLUX2_KLEIN_BASE_4B}
        self.trained = {run.method: run for run in plan.runs.values() if run.trained}
        self.rewards, self.activations = reward_weights(), reward_activations()

    def of(self, file: Path) -> Iterator[Measurement]:
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "peak_gb" in line:
                yield Prediction(self, line, former="sweep" in file.name).measurement()


class Prediction:
    """The prediction of one line.

    Args:
        comparison: what all lines share.
        line: of the file.
        former: whether peft's own adapter layer was measured.
    """

    def __init__(self, comparison: Comparison, line: Mapping[str, Any], *, former: bool) -> None:
        self.line, self.what = line, line["what"]
        self.architecture = comparison.architectures[line["net"]]
        self.model = catalog.read()[comparison.roles[line["net"]]]
        self.peft = former or self.what.startswith("peft")
        if "128 tokens" in self.what:
            self.architecture = replace(self.architecture, tokens=128)
        alone = "int8" in self.what  # without reward models
        self.setting = Setting(
            resolution=FULL.resolution,
            lora_rank=RANK,
            micro_batch=line.get("m", 0),
            gradient_checkpointing=line.get("ck", True),
            quantize="int8" if alone else "none",
            rewards=0 if alone else comparison.rewards,
            reward_activations=comparison.activations,
        )
        if "method" in line:
            run = comparison.trained[line["method"]]
            method = registry.create(run.method, run.hyperparameters)
            images = line.get("images", line["m"])
            self.setting = replace(
                self.setting,
                images=images,
                trained_steps=run.nfe_theta or 1,
                kept_images=images if line.get("keep") else 0,
                reward_activations=(
                    comparison.activations if method.needs_reward_gradients else None
                ),
                retained=run.method == "reward_instruct",  # RG-LCD takes one gradient for all
            )
        self.phases = memory_model.phases(self.architecture, self.model, self.setting)
        size = architectures.size(self.architecture, self.model, FULL.resolution, RANK)
        self.adapter = FLOAT * size.adapter  # bytes

    def measurement(self) -> Measurement:
        images = f"{self.setting.micro_batch} images"
        config = self.architecture.transformer
        table = config.get("pos_embed_max_size", 0) ** 2 * config.get("caption_projection_dim", 0)
        if "method" in self.line:
            case = f"iteration of {self.line['method']}, {images}"
            total = memory_model.peak(self.phases) - 2 * self.adapter
        else:
            parts = self.phases["sampling"]
            total = sum(parts[name] for name in ("network", "autoencoder", "rewards", "adapter"))
            case, own = self._call(images)
            total += own
        details = ["no checkpointing"] * (not self.setting.gradient_checkpointing)
        details += ["graphs kept"] * bool(self.setting.kept_images)
        details += ["compiled"] * ("compiled" in self.what and self.what not in case)
        details += ["decoder too"] * ("decoder too" in self.what)
        details += ["int8 weights"] * (self.setting.quantize == "int8")
        details += ["bfloat16 adapter"] * ("adapter in bf16" in self.what)
        details += ["128 tokens"] * (self.architecture.tokens == 128)
        details += ["peft's layer"] * (self.peft and self.line.get("grad", False))
        gigabytes = (total + FLOAT * table) / memory_model.GB
        case = ", ".join([case, *details])
        return Measurement(self.architecture.title, case, self.line["peak_gb"], gigabytes)

    def _call(self, images: str) -> tuple[str, float]:
        """A single call: its name, and its bytes beside the weights."""
        if self.what.startswith("decode"):
            resolution, count = DECODED.get(self.what, (FULL.resolution, self.setting.micro_batch))
            decoded = count * memory_model.decoder(self.architecture.vae, resolution).forward
            return f"{self.what}, {count} images", decoded
        if self.what == "direction":
            parts = self.phases["reward gradients"]
            return f"reward gradients, {images}", parts["decoder and rewards"]
        if not self.line["grad"]:
            return f"forward, {images}", self.phases["sampling"]["activations"]
        own = self.phases["update"]["activations"] + self.adapter  # its gradients
        return f"update, {images}", own + (self._copies() if self.peft else 0)

    def _copies(self) -> float:
        """What peft's layer saved in addition: a float32 copy of the input of every adapted layer.

        Four in a block with two streams, in place of two in bfloat16 that layers share; three in a
        single block, in place of one. A bfloat16 adapter needs no such copies.
        """
        if "adapter in bf16" in self.what:
            return 0.0
        chain = memory_model.blocks(self.architecture, self.model, FULL.resolution, RANK, HALF)
        double = self.architecture.transformer["num_layers"]
        added = [
            block.given * (4 * FLOAT / HALF - 2 if place < double else 3 * FLOAT / HALF - 1)
            for place, block in enumerate(chain)
        ]
        count = self.setting.micro_batch * architectures.evaluations(self.model)
        return count * (added[-1] if self.setting.gradient_checkpointing else sum(added))


def table(found: Sequence[Measurement]) -> list[str]:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in found:
        groups.setdefault((one.model, one.case), []).append(one)
    lines = ["| model | what | predicted | measured | difference |", "|---|---|---:|---:|---:|"]
    for (model, case), group in sorted(groups.items(), key=lambda item: in_order(*item[0])):
        values = sorted({f"{one.measured:.1f}" for one in group}, key=float)
        measured = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
        worst = max((one.predicted / one.measured - 1 for one in group), key=abs)
        predicted = f"{group[0].predicted:.1f}"
        lines.append(f"| {model} | {case} | {predicted} | {measured} | {100 * worst:+.1f} % |")
    return lines


def in_order(*texts: str) -> list[list[str | int]]:
    """A key that sorts numbers in texts by their value."""
    return [
        [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
        for text in texts
    ]


def work() -> None:
    comparison = Comparison()
    found = [one for file in sorted(MEASURED.glob("*.jsonl")) for one in comparison.of(file)]
    print("\n".join(table(found)))


if __name__ == "__main__":
    errors.run_cli("memory_model", work)
