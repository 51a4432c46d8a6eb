"""Any folder of images is scored by any metric, with the right prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support import tiny_hub
from support.chat_server import brightness_grade

from tafs import cli
from tafs.assets import sources
from tafs.assets.sources import AssetSettings, HubAssets
from tafs.data import prompts
from tafs.data.plugins.shapes import FOLDER
from tafs.data.prompts import Prompt
from tafs.evaluation import image_archive
from tafs.evaluation.image_scores import ImageScore, diversity, paired, score_images
from tafs.report import judged, stats
from tafs.rewards import golden
from tafs.shapes import rewards
from tafs.shapes.render import render
from tafs.shapes.scenes import IMAGE_SIZE, sample_scene

ROOT = Path(__file__).resolve().parents[2]
SOURCE = sources.of(
    AssetSettings(
        assets="shapes", lock="", device="cpu", dtype="float32", gradient_checkpointing=False
    )
)
ASKED = prompts.read(FOLDER / "test.jsonl")[:12]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve random images 0.png ... 11.png of ASKED, each of another brightness."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(ASKED)):
        pixels = rng.integers(0, 20 * (i + 1), (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def lines(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
    prompts.write(folder.parent / name, rows)
    return folder.parent / name


def expected(folder: Path, metric: str) -> list[float]:
    """The scores of the images 0.png ... in the order of ASKED."""
    files = [folder / f"{i}.png" for i in range(len(ASKED))]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    reward = rewards.build(metric, strict_geneval=True)
    return reward.report(reward.score(images, ASKED)).tolist()


@pytest.mark.parametrize("metric", ["clip", "geneval"])
def test_images_belong_to_prompts_by_the_numbers_in_their_names(folder, metric):
    found = score_images(metric, folder, lines(folder, [dict(p.row) for p in ASKED]), SOURCE)
    assert [score.file.name for score in found] == [f"{i}.png" for i in range(len(ASKED))]
    assert [score.prompt.text for score in found] == [prompt.text for prompt in ASKED]
    np.testing.assert_allclose([score.value for score in found], expected(folder, metric), 1e-5)


@pytest.mark.parametrize("key", ["prompt", "text"])
def test_file_names_in_lines_of_any_order_decide(folder, key):
    named = [{"file_name": f"{i}.png", key: prompt.text} for i, prompt in enumerate(ASKED)]
    order = np.random.default_rng(1).permutation(len(ASKED))
    found = score_images("clip", folder, lines(folder, [named[i] for i in order]), SOURCE)
    values = np.array(expected(folder, "clip"))
    np.testing.assert_allclose([score.value for score in found], values[order], 1e-5)


def test_formats_and_folders_below_are_found_and_transparent_parts_are_white(tmp_path):
    images = tmp_path / "images"
    (images / "b").mkdir(parents=True)
    white, clear = (
        Image.new("RGB", (IMAGE_SIZE,) * 2, "white"),
        Image.new("RGBA", (IMAGE_SIZE,) * 2),
    )
    clear.save(images / "a.png")
    white.save(images / "b" / "1.webp", lossless=True)
    white.save(images / "c.JPG")
    white.convert("P").save(images / "d.png")
    (images / "notes.txt").write_text("not an image")
    file = tmp_path / "prompts.txt"
    file.write_text("a circle\n" * 4)
    found = score_images("clip", images, file, SOURCE)
    assert len(found) == 4 and len({round(score.value, 3) for score in found}) == 1


def scored(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["score", "--scale", "smoke", *map(str, arguments)])  # the last --scale counts
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_the_command_judges_images_of_the_embedded_world_with_geneval(
    tmp_path, capsys, monkeypatch
):
    """Eleven of twelve images show what their prompts ask for."""
    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(3)
    scenes = [sample_scene(prompt.row, rng) for prompt in ASKED]
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(image_archive.pixels(render(scenes[:-1] + [scenes[0][:0]]))):
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    rows = [{**prompt.row, "file_name": f"{i}.png"} for i, prompt in enumerate(ASKED)]
    file, out = lines(tmp_path / "images", rows), tmp_path / "scores.csv"
    given = ("--metric", "geneval", "--images", tmp_path / "images", "--prompts", file)
    code, printed, refused = scored(capsys, *given, "--out", out)
    assert (code, refused) == (0, "")
    table = pd.read_csv(out)
    assert table["geneval"].tolist() == [1.0] * 11 + [0.0]
    assert table["file"].tolist() == [f"{i}.png" for i in range(12)]
    assert table["prompt"].tolist() == [prompt.text for prompt in ASKED]
    values = 100 * table["geneval"].to_numpy().reshape(1, -1, 1)
    mean = stats.mean(values, [prompt.tag for prompt in ASKED], macro=True)
    assert printed.startswith(f"GenEval {mean:.2f}, 95 % interval [")
    assert printed.endswith(f", 12 images\nwrote {out}\n")


def test_images_of_one_prompt_are_resampled_together():
    one, other = Prompt("one", {"tag": "t"}), Prompt("other", {"tag": "t"})
    pairs = [(one, 0.2), (other, 0.6), (one, 0.4), (one, float("nan")), (other, 0.6)]
    scores = [ImageScore(Path(f"{i}.png"), *pair) for i, pair in enumerate(pairs)]
    found = judged.of_images("hpsv2", scores)
    expected = stats.mean_interval([[[0.2, 0.4], [0.6, 0.6]]], ["t", "t"])
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.n_images, found.n_missing) == (4, 1)


def test_a_served_metric_is_asked_over_its_server(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ROOT / "tests" / "support" / "chat_server.py"
    monkeypatch.setenv("TAFS_SERVER", json.dumps([sys.executable, str(script), "{port}"]))
    monkeypatch.setattr(HubAssets, "folder", lambda self, resource: tmp_path / resource)
    monkeypatch.setattr(HubAssets, "golden_scores", None)
    source = sources.of(SOURCE.settings.model_copy(update={"assets": "hub"}))
    file = lines(folder, [{"prompt": prompt.text} for prompt in ASKED])
    found = score_images("unifiedreward", folder, file, source)
    grades = [brightness_grade(np.asarray(Image.open(score.file))) for score in found]
    assert [score.value for score in found] == pytest.approx(grades, abs=1e-3)


def test_real_images_are_scored_with_published_metrics_on_a_scale_of_gpus(
    tmp_path, capsys, monkeypatch
):
    """The golden scores of CLIP are stored at its first use; those of `ocr` are shipped."""
    monkeypatch.chdir(ROOT)
    tiny = tiny_hub.folders(tmp_path / "hub")
    stored = tmp_path / "golden.json"
    monkeypatch.setattr(HubAssets, "folder", lambda self, resource: tiny(resource))
    digests = lambda self, names, *_: dict.fromkeys(names, "")  # noqa: E731
    monkeypatch.setattr(HubAssets, "_file_digests", digests)
    monkeypatch.setattr(HubAssets, "golden_scores", stored)
    images, file, out = tmp_path / "images", tmp_path / "prompts.txt", tmp_path / "out.csv"
    images.mkdir()
    Image.fromarray(golden.images()["text"]).resize((448, 448)).save(images / "a.png")
    file.write_text('a sign that says "STOPS"\n')
    given = ["--images", images, "--prompts", file, "--out", out, "--scale"]
    code, printed, refused = scored(capsys, "--metric", "ocr", *given, "paper", "--device", "cpu")
    assert (code, printed, refused) == (
        0,
        f"OCR 80.0, 95 % interval -, 1 images\nwrote {out}\n",
        "",
    )
    assert not stored.exists()
    code, printed, _ = scored(capsys, "--metric", "clip", *given, "one-gpu", "--device", "cpu")
    said = f"reward clip: stored the golden scores of its weights in {stored}\nCLIP "
    assert code == 0 and printed.startswith(said)
    assert scored(capsys, "--metric", "vendi", *given, "paper", "--device", "cpu")[0] == 0
    code, printed, refused = scored(capsys, "--metric", "clip", *given, "shapes")
    assert code == 2 and "a.png: reward clip: images must be [B, 3, 24, 24]" in refused
    assert refused.endswith(
        "give --scale one-gpu or paper to score images of any size with the published ones\n"
    )


def test_vendi_is_the_diversity_of_all_images_and_of_those_of_each_prompt(tmp_path, capsys):
    images, file = tmp_path / "images", tmp_path / "prompts.txt"
    images.mkdir()
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8) for _ in range(2)]
    for number, pixels in enumerate([drawn[0], drawn[0], drawn[1], drawn[1], drawn[0]]):
        Image.fromarray(pixels).save(images / f"{number}.png")
    file.write_text("a red ring\na red ring\na\na\na circle\n")
    found = diversity(images, file, SOURCE)
    assert [(one.prompt, one.images) for one in found] == [(None, 5), ("a red ring", 2), ("a", 2)]
    # Three images are alike and two are: the eigenvalues of the 5 x 5 cosines are those of
    # [[3, 2 c], [3 c, 2]] / 5 for the cosine c of the two images.
    clip = rewards.build("clip").scorer
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255
    c = torch.nn.functional.cosine_similarity(*clip.embed(pixels).split(1)).item()
    shares = np.linalg.eigvals(np.array([[3, 2 * c], [3 * c, 2]]) / 5)
    assert found[0].value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert [one.value for one in found[1:]] == pytest.approx([1, 1], abs=1e-3)
    given = ("--metric", "vendi", "--images", images, "--prompts", file)
    code, printed, _ = scored(capsys, *given, "--out", tmp_path / "out.csv")
    assert code == 0
    assert f"Vendi score {found[0].value:.2f} of 5 images; within a prompt 1.00 of 2" in printed
    assert pd.read_csv(tmp_path / "out.csv")["images"].tolist() == [5, 2, 2]
    code, printed, _ = scored(capsys, *given, "--out", tmp_path / "out.csv", "--json")
    assert json.loads(printed)["within_prompts"]["prompts"] == 2


TEXTS = [{"prompt": prompt.text} for prompt in ASKED]
NAMED = [{**row, "file_name": f"{i}.png"} for i, row in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "metric, rows, said",
    [
        ("clip", TEXTS[:-1], "images: has 12 images, but "),
        ("clip", NAMED[:-1], "has 11 prompts for 11 of them; give one prompt for every image"),
        ("clip", [*NAMED[:-1], TEXTS[0]], "1 of 12 lines have no 'file_name'"),
        ("clip", [*NAMED[:-1], NAMED[0]], "12 prompts for 11 of them"),
        ("clip", [*NAMED[:-1], NAMED[0] | {"file_name": "../x.png"}], "'../x.png' is not an image"),
        ("clip", [{"caption": "a circle"}] * 12, "not a JSON object with a 'prompt'"),
        ("geneval", TEXTS, "has no 'include', which geneval needs"),
        ("jpg_compressibility", TEXTS, "'jpg_compressibility'; did you mean 'jpeg_compressibil"),
        ("geneval2", TEXTS, "has no 'vqa_list', which geneval2 needs"),
        ("clipp", TEXTS, "--metric: unknown metric 'clipp'; did you mean 'clip'?"),
    ],
)
def test_prompts_that_do_not_fit_are_one_line(metric, rows, said, folder, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ("--metric", metric, "--images", folder, "--prompts", lines(folder, rows))
    code, printed, refused = scored(capsys, *given)
    assert (code, printed) == (2, "")
    assert said in refused and refused.startswith("tafs score: ") and refused.count("\n") == 1


def test_files_that_are_missing_or_no_images_are_named(folder, tmp_path):
    file = lines(folder, TEXTS)
    with pytest.raises(FileNotFoundError, match="none: is not a folder"):
        paired(tmp_path / "none", file)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: not found"):
        paired(folder, tmp_path / "none.jsonl")
    (folder / "3.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"3\.png: is not a readable image"):
        score_images("clip", folder, file, SOURCE)
    Image.new("RGB", (9, 9)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png: reward clip: images must be \[B, 3, 24, 24\]"):
        score_images("clip", folder, file, SOURCE)
