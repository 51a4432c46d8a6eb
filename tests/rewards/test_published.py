"""The published reward models against the packages that they were published with."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import hpsv2_package, tiny_rewards
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessor, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tafs.data.prompts import Prompt
from tafs.rewards import compat, hpsv2, learned, registry
from tafs.rewards.clip import CLIPScore, PickScore
from tafs.rewards.hpsv2 import HPSv2
from tafs.rewards.imagereward import ImageReward
from tafs.rewards.metrics import Metric

NAMES = ("clip", "pickscore", "hpsv2", "imagereward")
CAPTIONS = (
    "a red square left of a blue circle",
    "Zwölf Boxkämpfer, it's 3 o'clock & more",
    "a very long caption " * 30,
    "",
)
READ = {  # what each model is loaded from
    "clip": ("clip",),
    "pickscore": ("pickscore", "clip-h"),
    "hpsv2": ("hpsv2/HPS_v2.1_compressed.pt",),
    "imagereward": ("imagereward/ImageReward.pt", "imagereward/med_config.json", "bert"),
}
FILES = {  # the weights, and others that can be missing
    "clip": ("clip/model.safetensors", "clip/config.json", "clip/preprocessor_config.json"),
    "pickscore": ("pickscore/model.safetensors", "clip-h/tokenizer_config.json"),
    "hpsv2": READ["hpsv2"],
    "imagereward": (*READ["imagereward"][:2], "bert/vocab.txt"),
}
REMEDY = r"; fetch the model again\Z"  # in one line
SIZES = ((224, 224), (512, 512), (24, 24), (300, 451))
# PIL rounds to 8 bits after each of its two passes: half a level at the end, and half a level of
# the first pass times 1.25, the sum of the bicubic kernel's magnitudes.
LEVELS = 1.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every model."""
    root = tmp_path_factory.mktemp("rewards")
    tiny_rewards.clip(root / "clip")
    tiny_rewards.pickscore(root / "pickscore")
    tiny_rewards.clip_processor(root / "clip-h")
    tiny_rewards.hpsv2(root / "hpsv2" / "HPS_v2.1_compressed.pt")
    tiny_rewards.bert_tokenizer(root / "bert")
    tiny_rewards.imagereward(root / "imagereward", root / "bert")
    return root


def load(name: str, root: Path) -> learned.LearnedReward:
    kind: Any = {"clip": CLIPScore, "pickscore": PickScore, "hpsv2": HPSv2}.get(name, ImageReward)
    return kind(*(root / file for file in READ[name]))


@pytest.fixture(scope="module")
def scorers(folder: Path) -> dict[str, Any]:
    return {name: load(name, folder) for name in NAMES}


def pictures(count: int, height: int = 224, width: int = 224) -> np.ndarray:
    """Colour gradients, hard edges and noise, [count, height, width, 3] uint8."""
    rng = np.random.default_rng(count * height + width)
    y, x = np.mgrid[:height, :width]
    drawn = []
    for _ in range(count):
        a, b, c = rng.uniform(1, 4, 3)
        waves = [
            np.sin(3 * a * y / height + c),
            np.cos(3 * b * x / width),
            np.sin(c * (x + y) / 90),
        ]
        image = 128 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 10, (height, width, 3))
        top, left = rng.integers(0, [height // 2, width // 2])
        corner = rng.choice([0, 255], size=3)
        image[top : top + height // 3, left : left + width // 3] = corner
        drawn.append(image.clip(0, 255).astype(np.uint8))
    return np.stack(drawn)


def tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def prompts(count: int) -> list[Prompt]:
    return [Prompt(CAPTIONS[i % len(CAPTIONS)], {}) for i in range(count)]


def clip_reference(folder: Path, processor: Path, image: Image.Image, text: str) -> Tensor:
    """exp(logit_scale) cosine, as PickScore's model card computes it."""
    read = CLIPProcessor.from_pretrained(processor)
    model = AutoModel.from_pretrained(folder).eval()
    settings = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    with torch.no_grad():
        pixels = model.get_image_features(**read(images=image, return_tensors="pt"))
        caption = model.get_text_features(**read(text=text, **settings))
    a, b = pixels.pooler_output[0], caption.pooler_output[0]
    return model.logit_scale.exp().detach() * (a @ b) / (a.norm() * b.norm())


@pytest.fixture
def hpsv2_score(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Image.Image, str], float]:
    """hpsv2's own `score` with a tiny model of its bundled open_clip."""
    package = hpsv2_package.import_hpsv2()
    their_clip = package.src.open_clip
    config = tmp_path / "tiny-hpsv2.json"
    config.write_text(json.dumps(tiny_rewards.HPSV2), encoding="utf-8")
    their_clip.add_model_config(config)
    model, _, preprocess = their_clip.create_model_and_transforms(
        config.stem, precision="amp", light_augmentation=True, aug_cfg={}, output_dict=True
    )
    own = package.img_score
    monkeypatch.setitem(own.model_dict, "model", model)
    monkeypatch.setitem(own.model_dict, "preprocess_val", preprocess)
    monkeypatch.setattr(own, "root_path", str(tmp_path))
    monkeypatch.setattr(own, "device", "cpu")
    file = folder / "hpsv2" / "HPS_v2.1_compressed.pt"
    return lambda image, text: own.score(image, text, cp=str(file), hps_version="v2.1")[0]


@pytest.mark.parametrize("processor", [CLIPImageProcessor, CLIPImageProcessorPil])
@pytest.mark.parametrize("size", SIZES)
def test_clip_preprocesses_like_transformers_up_to_rounding(folder, scorers, processor, size):
    [image] = pictures(1, *size)
    theirs = processor.from_pretrained(folder / "clip")(images=Image.fromarray(image))
    expected = torch.as_tensor(np.array(theirs["pixel_values"])) * scorers["clip"].std
    found = scorers["clip"].resize(tensor(image[None]))
    levels = (found - expected - scorers["clip"].mean).abs().max() * 255
    # Without resizing there is no rounding.
    assert levels < (1e-3 if size == (224, 224) else LEVELS)


@pytest.mark.parametrize("size", SIZES)
def test_imagereward_preprocesses_like_its_package_up_to_rounding(scorers, size):
    scorer = scorers["imagereward"]
    [image] = pictures(1, *size)
    expected = scorer.model.preprocess(Image.fromarray(image)) * scorer.std + scorer.mean
    levels = (scorer.resize(tensor(image[None])) - expected).abs().max() * 255
    assert levels < (1e-3 if size == (224, 224) else LEVELS)


@pytest.mark.parametrize("text", CAPTIONS)
@pytest.mark.parametrize(
    ("name", "processor", "factor"),
    [("clip", "clip", 100 * np.exp(-3.2)), ("pickscore", "clip-h", 1.0)],
)
def test_clip_and_pickscore_equal_the_model_cards_code(
    folder, scorers, name, processor, factor, text
):
    [image] = pictures(1)
    expected = clip_reference(folder / name, folder / processor, Image.fromarray(image), text)
    found = scorers[name](tensor(image[None]), [Prompt(text, {})])
    published = scorers[name].reward().report(found)
    torch.testing.assert_close(
        published[0], expected * factor, atol=1e-5, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_equals_its_package(scorers, hpsv2_score, size):
    """The package resizes floats, so that there is no rounding."""
    images = pictures(len(CAPTIONS), *size)
    found = scorers["hpsv2"](tensor(images), prompts(len(images)))
    expected = list(map(hpsv2_score, map(Image.fromarray, images), CAPTIONS))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_imagereward_equals_its_package(folder, scorers):
    files = folder / "imagereward"
    size: Any = {"width": 64, "depth": 2, "patch": tiny_rewards.PATCH, "device": "cpu"}
    theirs = compat.build_imagereward(files / "med_config.json", folder / "bert", **size).eval()
    theirs.load_state_dict(torch.load(files / "ImageReward.pt", weights_only=True))
    images = pictures(len(CAPTIONS))
    found = scorers["imagereward"](tensor(images), prompts(len(images)))
    pairs = zip(CAPTIONS, map(Image.fromarray, images), strict=True)
    expected = [theirs.score(text, image) for text, image in pairs]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert np.std(expected) > 0.01


def test_the_architecture_of_vit_h_14_is_inferred_from_its_weights():
    with torch.device("meta"):
        state = open_clip.create_model("ViT-H-14", device="meta").state_dict()
    assert hpsv2.architecture(state) == open_clip.get_model_config("ViT-H-14")


def test_imagereward_uses_the_head_width_of_blips_large_encoder(scorers, monkeypatch):
    compat.import_imagereward()
    from ImageReward.models.BLIP import blip

    monkeypatch.setattr(blip, "VisionTransformer", lambda **settings: settings)
    settings, width = blip.create_vit("large", scorers["imagereward"].side)
    assert settings["num_heads"] == width // compat.BLIP_HEAD_WIDTH


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (256, 256)])
def test_the_gradient_equals_a_finite_difference(scorers, name, size):
    # Away from 0 and 1, where resized pixels are clipped.
    images = (0.25 + 0.5 * tensor(pictures(2, *size))).requires_grad_()
    scorers[name](images, prompts(2)).sum().backward()
    direction, step = images.grad / images.grad.norm(), 0.2
    low, high = (
        scorers[name](images.detach() + sign * step * direction, prompts(2)).sum()
        for sign in (-1, 1)
    )
    slope = (high - low).item() / (2 * step)
    assert slope == pytest.approx(images.grad.norm().item(), rel=0.05)


def test_tokens_of_captions_are_cached_with_a_limit(folder):
    scorer = load("imagereward", folder)
    images = tensor(pictures(4, 64, 64))
    scorer(images, prompts(1) * 4)
    scorer(images, prompts(2) * 2)
    kept = scorer.token_ids.cache_info()
    assert (kept.misses, kept.hits) == (2, 1)
    assert kept.maxsize == learned.KEPT_CAPTIONS > 25_432 + 2_048


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_a_caption_is_encoded_once_and_alone(folder, name, monkeypatch):
    scorer, captions = load(name, folder), CAPTIONS[:2]
    encode, encoded = scorer.embed_captions, []

    def counted(tokens: Tensor) -> Tensor:
        encoded.append(len(tokens))
        return encode(tokens)

    monkeypatch.setattr(scorer, "embed_captions", counted)
    reward, images = scorer.reward(), torch.rand(3, 3, 224, 224)
    texts = [captions[0], captions[0], captions[1]]
    together = reward.score(images, [Prompt(text, {}) for text in texts])
    alone = torch.cat([reward.score(images[n : n + 1], [Prompt(texts[n], {})]) for n in range(3)])
    assert encoded == [1, 1]
    torch.testing.assert_close(together, alone)
    scorer.cast(torch.bfloat16)  # the embeddings are no longer the model's
    reward.score(images, [Prompt(text, {}) for text in texts])
    assert encoded == [1, 1, 1, 1]


def test_nothing_is_downloaded(folder, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    for name in NAMES:
        load(name, folder)


def test_a_reward_set_scores_in_chunks_and_reports(scorers):
    rewards = registry.RewardSet([scorer.reward() for scorer in scorers.values()])
    images, captions = tensor(pictures(5, 64, 64)), prompts(5)
    scores = rewards.score(images, captions, chunk=2)
    differentiable = rewards.differentiate(images, captions)
    for name in NAMES:
        torch.testing.assert_close(scores[name], differentiable[name], atol=1e-5, rtol=1e-5)
    assert rewards.report(scores)["clip"] == pytest.approx(100 * scores["clip"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 3, 8, 8), float("nan")), "image 0 of 2 holds NaN or infinity"),
        (torch.full((2, 3, 8, 8), float("inf")), "image 0 of 2 holds NaN or infinity"),
        (torch.full((2, 3, 8, 8), -0.1), r"in \[0, 1\], not from -0.1 to -0.1"),
        (torch.full((2, 3, 8, 8), 255.0), r"in \[0, 1\], not from 255 to 255"),
        (torch.zeros(2, 3, 8, 8).int(), r"numbers in \[0, 1\], not torch.int32"),
        (torch.zeros(0, 3, 8, 8), "0 images, but 2 prompts"),
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\], not \[3, 8, 8\]"),
        (torch.zeros(2, 4, 8, 8), r"\[B, 3, H, W\], not \[2, 4, 8, 8\]"),
        (torch.zeros(3, 3, 8, 8), "3 images, but 2 prompts"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=f"^reward clip: .*{message}$"):
        registry.check_images("clip", images, prompts(2))


def test_rounding_errors_beyond_0_and_1_are_accepted():
    images = torch.tensor([-1e-4, 1 + 1e-4]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    registry.check_images("clip", images, prompts(2))


@pytest.mark.parametrize("score", ["score", "differentiate"])
def test_a_reward_set_checks_the_whole_batch(score):
    metric = Metric("toy", "Toy", "score", 2, differentiable=True)
    rewards = registry.RewardSet([registry.Reward(metric, lambda i, _: i.mean((1, 2, 3)))])
    images = torch.zeros(4, 3, 8, 8)
    assert getattr(rewards, score)(images[:0], [])["toy"].shape == (0,)
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="^reward toy: image 2 of 4 holds NaN"):
        getattr(rewards, score)(images, prompts(4))
    with pytest.raises(ValueError, match="^reward toy: 512 images, but 513 prompts$"):
        getattr(rewards, score)(torch.zeros(512, 3, 1, 1), prompts(513))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_truncated_files_are_refused(copy, name):
    file = copy / FILES[name][0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^reward {name}: .* is damaged .*{REMEDY}"):
        load(name, copy)
    file.write_bytes(content)
    for other in FILES[name]:
        (copy / other).rename(copy / "hidden")
        with pytest.raises(FileNotFoundError, match=f"reward {name}: .*{other} is missing; fetch"):
            load(name, copy)
        (copy / "hidden").rename(copy / other)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("clip", "visual_projection.weight"),
        ("pickscore", "text_model.final_layer_norm.bias"),
        ("hpsv2", "transformer.resblocks.1.ln_2.bias"),
        ("hpsv2", "visual.conv1.weight"),
        ("imagereward", "mlp.layers.0.weight"),
        ("imagereward", "blip.visual_encoder.patch_embed.proj.weight"),
    ],
)
def test_a_missing_weight_is_refused_by_its_name(copy, name, weight):
    file = copy / FILES[name][0]
    if file.suffix == ".safetensors":
        state = load_file(file)
        del state[weight]
        save_file(state, file, metadata={"format": "pt"})
    else:
        content = torch.load(file, weights_only=True)
        del content.get("state_dict", content)[weight]
        torch.save(content, file)
    with pytest.raises(ValueError, match=rf"^reward {name}: .*{weight}.*{REMEDY}"):
        load(name, copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    shutil.rmtree(copy / "clip-h")
    tiny_rewards.bert_tokenizer(copy / "clip-h")
    shutil.copy(copy / "clip" / "preprocessor_config.json", copy / "clip-h")
    with pytest.raises(ValueError, match="reward pickscore: .*clip-h is damaged"):
        load("pickscore", copy)
