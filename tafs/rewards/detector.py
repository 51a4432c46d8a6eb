"""GenEval with a real detector: Mask2Former finds the objects, CLIP classifies their colours.

Follows the authors' evaluate_images.py (https://github.com/djghosh13/geneval), which uses
mmdetection and open_clip, with transformers' models and another checkpoint of the same detector:

- images are resized to fit 800 x 1333 and normalised as in mmdetection's COCO configurations;
- instances are those of its MaskFormer head: the 100 best pairs of query and class, whose masks
  may overlap, without non-maximum suppression;
- objects score above 0.3, or 0.9 in the task "counting"; at most 16 are kept per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes
from transformers import Mask2FormerForUniversalSegmentation

from tafs.data.geneval_rows import CLASSES, COLORS
from tafs.data.prompts import Prompt
from tafs.rewards import learned
from tafs.rewards.clip import CLIPScore
from tafs.rewards.geneval import Detection, check_metadata, geneval_verdict
from tafs.rewards.metrics import METRICS, Reward

# Labels of COCO checkpoints on the hub, some of them Pascal VOC's -> GenEval's class names.
SPELLINGS = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"},
    **{"pottedplant": "potted plant", "diningtable": "dining table"},
}
COLOR_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
THRESHOLD = 0.3  # objects score above it
COUNTING_THRESHOLD = 0.9  # in the task "counting"
MAX_OBJECTS = 16  # per class
MAX_INSTANCES = 100  # per image, before the threshold
SHORT_EDGE, LONG_EDGE = 800, 1333  # pixels; images are resized to fit
STRIDE = 32  # the resized image is padded to a multiple of it
MEAN = (123.675, 116.28, 103.53)  # ImageNet's mean and deviation of 8-bit values
STD = (58.395, 57.12, 57.375)
GREY = 153.0  # value of the pixels around an object when its colour is classified


class Instance(NamedTuple):
    """One object; `label` is an index of the detector's classes, `mask` [H, W] is boolean."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor


class GenEval:
    """GenEval's verdict on the detector's objects: graded for training, 0/1 for evaluation."""

    metric = METRICS["geneval"]

    def __init__(self, detector: Mask2FormerDetector, *, strict: bool) -> None:
        self.detector = detector
        self.strict = strict

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.detector.model, *self.detector.colors.clip.networks)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert CLIP's weights; the detector's, a seventh, decide which objects there are."""
        self.detector.colors.cast(dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32 in [0, 1].

        Raises:
            ValueError: a prompt without GenEval's metadata or with an unknown class or colour.
        """
        for prompt in prompts:
            check_metadata(prompt.row)
        found = self.detector.detect(images, prompts)
        verdicts = [geneval_verdict(d, p.row) for d, p in zip(found, prompts, strict=True)]
        scores = [float(v.correct) if self.strict else v.graded for v in verdicts]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def reward(self) -> Reward:
        verdict = "strict" if self.strict else "graded"
        return Reward(self.metric, self, lambda: {"verdict": verdict})


class Mask2FormerDetector:
    """Detects objects of COCO's classes, and the colours that prompts ask for.

    Args:
        folder: a model in the layout of facebook/mask2former-swin-small-coco-instance.
        clip_folder: classifies colours; in the layout of openai/clip-vit-large-patch14.
        device: device of both models.
        batch: images per forward pass.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the model's classes are not
            COCO's; names it.
    """

    def __init__(
        self, folder: Path, clip_folder: Path, device: torch.device | str = "cpu", batch: int = 8
    ) -> None:
        self.device = torch.device(device)
        self.batch = batch
        name = GenEval.metric.name
        learned.require(name, folder / "config.json", folder / "model.safetensors")
        model = learned.pretrained(name, Mask2FormerForUniversalSegmentation, folder)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.classes = class_names(self.model.config.id2label, folder)
        self.colors = ColorClassifier(clip_folder, self.device)

    @torch.no_grad()
    def detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """The objects of each image [B, 3, H, W] in [0, 1], most confident first.

        The prompts' metadata decides the threshold and which objects' colours are classified.

        Raises:
            ValueError: a prompt asks for an unknown class or colour.
        """
        for prompt in prompts:
            check_row(prompt)
        pixels = (images.detach().to(self.device, torch.float32).clamp(0, 1) * 255).round()
        parts = [slice(low, low + self.batch) for low in range(0, len(pixels), self.batch)]
        return [found for part in parts for found in self._detect(pixels[part], prompts[part])]

    def _detect(self, pixels: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        inputs, inside = prepare(pixels)
        outputs = self.model(pixel_values=inputs)
        found: list[list[Detection]] = []
        crops: list[Tensor] = []
        cropped: list[tuple[int, int]] = []  # (image, object)
        for i, prompt in enumerate(prompts):
            objects = instances(
                outputs.class_queries_logits[i],
                outputs.masks_queries_logits[i],
                padded=(inputs.shape[-2], inputs.shape[-1]),
                inside=inside,
                size=(pixels.shape[-2], pixels.shape[-1]),
                threshold=COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD,
            )
            names = [self.classes[o.label] for o in objects]
            pairs = zip(names, objects, strict=True)
            found.append([Detection(name, o.score, o.box, None) for name, o in pairs])
            for j in to_color(names, prompt.row):
                crops.append(crop(pixels[i], objects[j]))
                cropped.append((i, j))
        colors = self.colors(crops, [found[i][j].label for i, j in cropped])
        for (i, j), color in zip(cropped, colors, strict=True):
            found[i][j] = found[i][j]._replace(color=color)
        return found


class ColorClassifier:
    """CLIP's zero-shot classifier of COLORS; the text embeddings of a class are cached."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.clip = CLIPScore(folder, device)
        self._weights: dict[str, Tensor] = {}

    def cast(self, dtype: torch.dtype) -> None:
        """Convert CLIP's weights."""
        self.clip.cast(dtype)
        self._weights.clear()

    @torch.no_grad()
    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """The colour of each crop [3, h, w] in [0, 1]; crops[i] shows class names[i]."""
        if not crops:
            return []
        resized = torch.cat([self.clip.resize(image[None]) for image in crops])
        embeddings = self.clip.embed_images(self.clip.normalize(resized)).float()
        weights = torch.stack([self.weights(name) for name in names])
        # The norm of the image's embedding does not change the argmax.
        closest = torch.einsum("nd,ncd->nc", embeddings, weights).argmax(-1)
        return [COLORS[index] for index in closest.tolist()]

    @torch.no_grad()
    def weights(self, name: str) -> Tensor:
        """[colours, D]: the normalised mean of each colour's normalised text embeddings."""
        if name not in self._weights:
            texts = [t.format(color=c, name=name) for c in COLORS for t in COLOR_TEMPLATES]
            captions = torch.stack([self.clip.token_ids(text) for text in texts])
            embeddings = self.clip.embed_captions(captions.to(self.clip.device)).float()
            units = F.normalize(embeddings, dim=-1)
            means = units.view(len(COLORS), len(COLOR_TEMPLATES), -1).mean(1)
            self._weights[name] = F.normalize(means, dim=-1)
        return self._weights[name]


def class_names(id2label: Mapping[int, str], folder: Path) -> tuple[str, ...]:
    """GenEval's names of a checkpoint's labels, in the checkpoint's order.

    Raises:
        ValueError: the labels are not COCO's 80 classes; names the folder and a label.
    """
    names = tuple(SPELLINGS.get(id2label[i], id2label[i]) for i in sorted(id2label))
    wrong = sorted(set(names) ^ set(CLASSES))
    if wrong or len(names) != len(CLASSES):
        what = f"{wrong[0]!r} is not in both" if wrong else "a class occurs twice"
        raise ValueError(f"{folder}: its id2label is not COCO's {len(CLASSES)} classes ({what})")
    return names


def check_row(prompt: Prompt) -> None:
    """Refuse a prompt (ValueError) with a class or colour that the detector does not know."""
    for item in (*prompt.row.get("include", ()), *prompt.row.get("exclude", ())):
        problem = None
        if item["class"] not in CLASSES:
            problem = f"the detector does not know the class {item['class']!r}"
        elif item.get("color", COLORS[0]) not in COLORS:
            problem = f"the colour {item['color']!r} is not one of {', '.join(COLORS)}"
        if problem:
            raise ValueError(f"GenEval cannot judge {prompt.text!r}: {problem}")


def to_color(names: Sequence[str], row: Mapping[str, Any]) -> list[int]:
    """Indices of the objects whose colour the row asks: the first `count` of each such class."""
    wanted: list[int] = []
    for item in row.get("include", ()):
        if "color" in item:
            wanted += [i for i, name in enumerate(names) if name == item["class"]][: item["count"]]
    return sorted(set(wanted))


def prepare(pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Preprocess images as mmdetection's test pipeline does.

    Args:
        pixels: [B, 3, H, W], 8-bit values as floats.

    Returns:
        Normalised images, resized to fit 800 x 1333 with their aspect ratio and zero-padded to a
        multiple of 32; height and width without the padding.
    """
    height, width = pixels.shape[-2:]
    scale = min(LONG_EDGE / max(height, width), SHORT_EDGE / min(height, width))
    inside = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    resized = F.interpolate(pixels.float(), size=inside, mode="bilinear", align_corners=False)
    mean, std = (pixels.new_tensor(v).float().view(3, 1, 1) for v in (MEAN, STD))
    # The original resizes 8-bit images.
    normalised = (resized.round() - mean) / std
    bottom, right = (-edge % STRIDE for edge in inside)
    return F.pad(normalised, (0, right, 0, bottom)), inside


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    inside: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> list[Instance]:
    """One image's objects that score above the threshold, at most MAX_OBJECTS of a class.

    The most confident come first. A score is the class's probability times the mean probability of
    the mask's pixels. A box spans the mask's pixels, end exclusive. Masks may overlap.

    Args:
        class_logits: [Q, classes + 1], the last one for "no object".
        mask_logits: [Q, h, w] of the padded input.
        padded: height and width of the input.
        inside: the same without its padding.
        size: the same of the image, of masks and of boxes.
        threshold: for the scores.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    best, index = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    # A score is at most the class's probability, so the others need no mask.
    index, best = index[best > threshold], best[best > threshold]
    if len(index) == 0:
        return []
    logits = F.interpolate(
        mask_logits[index // classes][None].float(), size=padded, mode="bilinear"
    )[..., : inside[0], : inside[1]]
    logits = F.interpolate(logits, size=size, mode="bilinear")[0]
    masks = logits > 0
    inner = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = best * inner
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    labels, masks, scores = index[order] % classes, masks[order], scores[order]
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1], device=masks.device)
    found: list[Instance] = []
    seen: dict[int, int] = {}
    for label, score, box, mask in zip(
        labels.tolist(), scores.tolist(), boxes.tolist(), masks, strict=True
    ):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= MAX_OBJECTS:
            found.append(Instance(label, score, (box[0], box[1], box[2], box[3]), mask))
    return found


def crop(pixels: Tensor, instance: Instance) -> Tensor:
    """The object alone on grey, cut to its box: [3, h, w] in [0, 1].

    Args:
        pixels: [3, H, W], 8-bit values as floats.
    """
    left, top, right, bottom = (int(edge) for edge in instance.box)
    return torch.where(instance.mask, pixels, GREY)[:, top:bottom, left:right] / 255
