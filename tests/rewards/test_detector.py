"""GenEval's detector: known answers for constructed logits and crops, tiny models end to end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny_detector, tiny_rewards
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tafs.data.prompts import Prompt
from tafs.rewards import detector
from tafs.rewards.detector import COLORS, GenEval, Instance, Mask2FormerDetector, instances

ON = 8.0  # logit inside a mask and -ON outside, so that bilinear edges do not move


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_rewards.clip(root / "clip")
    return tiny_detector.mask2former(root / "mask2former"), root / "clip"


@pytest.fixture(scope="module")
def tiny(folders):
    return Mask2FormerDetector(*folders)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def prompt(*needs, tag="mixed", exclude=()):
    return Prompt("a prompt", {"tag": tag, "include": list(needs), "exclude": list(exclude)})


def need(name, count=1, **extra):
    return {"class": name, "count": count, **extra}


def logits(*probabilities: dict[int, float], classes: int) -> torch.Tensor:
    """[Q, classes + 1] whose softmax has the given probabilities; the rest is "no object"."""
    rows = torch.full((len(probabilities), classes + 1), 1e-9)
    for row, given in zip(rows, probabilities, strict=True):
        for label, value in given.items():
            row[label] = value
        row[-1] = 1 - sum(given.values())
    return rows.log()


def rectangles(*boxes: tuple[int, int, int, int], height: int = 16, width: int = 16):
    """[Q, h, w] mask logits, positive inside (x0, y0, x1, y1)."""
    masks = torch.full((len(boxes), height, width), -ON)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = ON
    return masks


def found(classes, masks, threshold=0.3, side=64) -> list[Instance]:
    shape = (side, side)
    return instances(classes, masks, padded=shape, inside=shape, size=shape, threshold=threshold)


def test_the_hubs_labels_are_mapped_to_genevals_names():
    names = detector.class_names(dict(enumerate(tiny_detector.LABELS)), None)
    assert names == detector.CLASSES
    assert len(set(names)) == 80


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prompt(need("dragon")), "'a prompt': the detector does not know the class 'dragon'"),
        (prompt(need("dog"), exclude=[need("elf")]), "does not know the class 'elf'"),
        (prompt(need("dog", color="mauve")), "the colour 'mauve' is not one of red, orange"),
    ],
)
def test_unknown_classes_and_colours_are_refused(tiny, images, row, message):
    with pytest.raises(ValueError, match=message):
        GenEval(tiny, strict=True)(images[:1], [row])


def test_colours_are_classified_only_for_objects_whose_colour_is_asked():
    names = ["dog", "cat", "dog", "dog", "car"]
    row = prompt(need("dog", 2, color="red"), need("cat"), need("car", color="blue")).row
    assert detector.to_color(names, row) == [0, 2, 4]
    assert detector.to_color(names, prompt(need("dog", 3)).row) == []


@pytest.mark.parametrize(
    ("size", "inside", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((64, 96), (800, 1200), (800, 1216)),
        ((400, 1000), (533, 1333), (544, 1344)),
        ((1000, 400), (1333, 533), (1344, 544)),
    ],
)
def test_images_are_resized_to_fit_800_x_1333_and_padded_to_multiples_of_32(size, inside, padded):
    grey = torch.full((1, 3, *size), 100.0)
    inputs, within = detector.prepare(grey)
    assert within == inside
    assert tuple(inputs.shape) == (1, 3, *padded)
    assert not inputs[..., inside[0] :, :].any() and not inputs[..., inside[1] :].any()
    expected = (100 - torch.tensor(detector.MEAN)) / torch.tensor(detector.STD)
    for corner in (inputs[0, :, 0, 0], inputs[0, :, inside[0] - 1, inside[1] - 1]):
        torch.testing.assert_close(corner, expected)


def test_a_mask_has_the_images_resolution_and_its_mean_probability_weights_the_score():
    masks = rectangles((2, 5, 6, 8))
    [one] = found(logits({1: 0.9}, classes=3), masks)
    assert (one.label, one.box) == (1, (8, 20, 24, 32))
    # PIL's bilinear resizing is an independent implementation.
    large = np.asarray(Image.fromarray(masks[0].numpy()).resize((64, 64), Image.BILINEAR))
    assert np.array_equal(one.mask.numpy(), large > 0)
    inside = 1 / (1 + np.exp(-large[large > 0]))
    assert one.score == pytest.approx(0.9 * inside.mean(), abs=1e-5)
    unsure = found(
        logits({0: 0.55}, {1: 0.65}, classes=2), rectangles(*[(0, 0, 16, 16)] * 2) * 1e-4
    )
    assert [o.label for o in unsure] == [1]
    assert found(logits({0: 0.99}, classes=1), rectangles((0, 0, 0, 0))) == []


def test_overlapping_masks_are_both_complete():
    front, behind = (0, 0, 8, 8), (4, 4, 12, 12)
    one, two = found(logits({0: 0.95}, {1: 0.9}, classes=2), rectangles(front, behind))
    assert (one.label, two.label) == (0, 1)
    assert one.box == (0, 0, 32, 32) and two.box == (16, 16, 48, 48)
    # Logits are bilinear between cells; a corner inside the image is outside the mask.
    assert (one.mask.sum(), two.mask.sum()) == (32 * 32 - 1, 32 * 32 - 4)
    assert (one.mask & two.mask).sum() == 16 * 16 - 2


@pytest.mark.parametrize(("threshold", "labels"), [(0.3, [0, 1, 2]), (0.9, [0])])
def test_objects_above_the_threshold_are_sorted_by_confidence(threshold, labels):
    classes = logits({1: 0.8}, {3: 0.25}, {0: 0.99}, {2: 0.5}, classes=4)
    boxes = [(0, 0, 16, 16)] * 4
    objects = found(classes, rectangles(*boxes), threshold)
    assert [o.label for o in objects] == labels
    assert all(o.score > threshold for o in objects)


def test_the_16_most_confident_objects_of_a_class_are_kept():
    given = [{0: 0.5 + i / 100} for i in range(20)] + [{1: 0.4}, {1: 0.45}]
    objects = found(logits(*given, classes=2), rectangles(*[(0, 0, 16, 16)] * 22))
    assert [o.label for o in objects] == [0] * 16 + [1] * 2
    expected = [0.5 + i / 100 for i in range(19, 3, -1)] + [0.45, 0.4]
    assert [o.score for o in objects] == pytest.approx(expected, abs=1e-3)


def test_an_image_has_at_most_100_instances():
    given = [{i: 0.5 + i / 1000} for i in range(120)]
    objects = found(logits(*given, classes=120), rectangles(*[(0, 0, 16, 16)] * 120), side=16)
    assert [o.label for o in objects] == list(range(119, 19, -1))


def test_the_padding_is_removed_before_resizing_to_the_image():
    masks = rectangles((4, 2, 24, 10), height=16, width=24)  # the last 4 columns are padding
    [one] = instances(
        logits({0: 0.9}, classes=1),
        masks,
        padded=(64, 96),
        inside=(64, 80),
        size=(128, 160),
        threshold=0.3,
    )
    assert one.mask.shape == (128, 160)
    assert one.box == (32, 16, 160, 80)


def test_a_crop_shows_only_the_object_on_grey():
    pixels = torch.tensor([255.0, 0, 0]).view(3, 1, 1).expand(3, 8, 10)
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[2:4, 3:9] = True
    mask[4:6, 3:5] = True
    alone = detector.crop(pixels, Instance(0, 0.9, (3.0, 2.0, 9.0, 6.0), mask))
    assert alone.shape == (3, 4, 6)
    red, grey = torch.tensor([1.0, 0, 0]), torch.full((3,), 0x99 / 255)
    assert torch.equal(alone[:, 0, 5], red) and torch.equal(alone[:, 3, 0], red)
    assert torch.equal(alone[:, 3, 5], grey)


def test_a_colours_weight_is_the_mean_of_its_three_embeddings(tiny, folders):
    model = CLIPModel.from_pretrained(folders[1]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders[1])
    weights = tiny.colors.weights("teddy bear")
    assert weights.shape == (10, 32)
    for color in ("red", "white"):
        units = []
        for text in (f"{color} teddy bear", f"{color}-colored teddy bear", f"{color} object"):
            tokens = tokenizer(f"a photo of a {text}", return_tensors="pt")
            with torch.no_grad():
                [vector] = model.get_text_features(**tokens).pooler_output
            units.append(vector / vector.norm())
        mean = sum(units) / 3
        expected = mean / mean.norm()
        torch.testing.assert_close(weights[COLORS.index(color)], expected, atol=1e-5, rtol=1e-4)


def test_an_object_has_the_colour_with_the_closest_embedding(folders, monkeypatch):
    """Text embeddings are replaced by CLIP's image embeddings of the colours."""
    drawn = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    shades = list(drawn.expand(10, 3, 30, 40))
    processor = CLIPImageProcessorPil.from_pretrained(folders[1])
    pictures = [Image.fromarray((s.permute(1, 2, 0) * 255).byte().numpy()) for s in shades]
    model = CLIPModel.from_pretrained(folders[1]).eval()
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        vectors = model.get_image_features(pixel_values=pixels).pooler_output
    classifier = detector.ColorClassifier(folders[1])
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    monkeypatch.setattr(classifier, "weights", {"dog": units, "cat": units.flip(0)}.get)
    assert classifier(shades, ["dog"] * 10) == list(COLORS)
    assert classifier(shades, ["cat"] * 10) == list(COLORS)[::-1]
    assert classifier([shades[0], shades[0]], ["dog", "cat"]) == ["red", "white"]


@pytest.fixture(scope="module")
def seen(tiny, images):
    return tiny.detect(images, [prompt()] * len(images))


def test_counting_considers_only_confident_objects(tiny, images, seen, monkeypatch):
    limit = np.median([d.score for objects in seen for d in objects])
    monkeypatch.setattr(detector, "COUNTING_THRESHOLD", limit)
    counted = tiny.detect(images, [prompt(tag="counting")] * len(images))
    sure = [[d for d in objects if d.score > limit] for objects in seen]
    assert [[d.box for d in objects] for objects in counted] == [
        [d.box for d in objects] for objects in sure
    ]
    assert 0 < sum(map(len, counted)) < sum(map(len, seen))


def test_verdicts_depend_on_the_detected_objects(tiny, images, seen):
    label = seen[0][0].label
    absent = next(name for name in detector.CLASSES if name not in {d.label for d in seen[0]})
    [colored] = tiny.detect(images[:1], [prompt(need(label, color="red"))])
    assert [d.color for d in colored].count(None) == len(colored) - 1
    color = next(d.color for d in colored if d.color)
    other = COLORS[COLORS.index(color) - 1]
    prompts = [
        prompt(need(label)),
        prompt(need(label), need(absent)),
        prompt(need(label, color=color)),
        prompt(need(label, color=other)),
        prompt(need(label), exclude=[need(label, 1)]),
    ]
    batch = images[:1].expand(len(prompts), -1, -1, -1)
    assert GenEval(tiny, strict=True)(batch, prompts).tolist() == [1, 0, 1, 0, 0]
    graded = GenEval(tiny, strict=False)(batch[:4], prompts[:4])
    assert graded.tolist() == [1, 0.5, 1, 0.5]
    assert graded.dtype == torch.float32


def test_scores_do_not_depend_on_batch_or_order(tiny, images, seen):
    prompts = [prompt(need(o[0].label), need(o[-1].label, color="red")) for o in seen]
    score = GenEval(tiny, strict=False)
    together = score(images, prompts)
    order = [2, 0, 1]
    assert torch.equal(score(images[order], [prompts[i] for i in order]), together[order])
    single = [tiny.detect(images[i : i + 1], [prompts[i]])[0] for i in range(3)]
    for objects, alone in zip(tiny.detect(images, prompts), single, strict=True):
        assert [(d.label, d.box, d.color) for d in objects] == [
            (d.label, d.box, d.color) for d in alone
        ]
        assert [d.score for d in objects] == pytest.approx([d.score for d in alone], abs=1e-5)


def test_a_missing_weight_and_a_truncated_file_are_refused(folders, tmp_path):
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="copy is damaged .class_predictor.weight is missing"):
        Mask2FormerDetector(copy, folders[1])
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="reward geneval: .*copy is damaged"):
        Mask2FormerDetector(copy, folders[1])


def test_a_detector_of_other_classes_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["id2label"]["0"] = "human"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="copy: its id2label is not COCO's 80 classes"):
        Mask2FormerDetector(copy, folders[1])
