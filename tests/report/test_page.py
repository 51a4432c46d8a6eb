"""The report's page: everything is on it, nothing on it is trusted, and it works in a browser."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import RunInfo
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import browser, synthetic

from tafs.experiment.claims import Claim, read
from tafs.experiment.schema import FIGURES
from tafs.experiment.specs import ReportSpec
from tafs.report import build, page, results, stats
from tafs.report.page import charts, content, diversity, sprites
from tafs.rewards import statistics
from tafs.rewards.metrics import METRICS
from tafs.runtime import receipts
from tafs.tracking import index_page

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = """
- id: gain
  claim: TAFS-GRPO is better than <b>the base</b> model.
  source: Table 2
  experiment: scores
  better:
    {row: {method: tafs_grpo}, than: [{method: base, nfe: few}], metrics: [clip, hpsv2]}
- id: other
  claim: Early images predict the final one.
  source: Table 7
  experiment: absent
  correlated: {step: 2, above: 0, metrics: [clip]}
"""
HOSTILE = """</script><img src=x onerror="alert(1)"> '"&{{ 7 * 7 }}"""
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Read(HTMLParser):
    """Elements of a page, and an assertion that every one is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.words += data

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))


def specs(runs: list[Path], **fields: Any) -> list[Any]:
    return [
        synthetic.table_spec(
            runs,
            kind=kind,
            name=kind,
            curve_nfe=(1, 4),
            figures={k: f"{kind}_{k}" for k in FIGURES} if kind in ("scores", "compute") else {},
            **fields,
        )
        for kind in ("scores", "compute", "gains", "correlation")
    ]


def built(root: Path, tables: list[Any]) -> Path:
    """The page of these tables."""
    spec = ReportSpec(scale="shapes", tables=tuple(tables))
    (root / "report_spec.json").write_text(spec.to_json(), encoding="utf-8")
    (root / "claims.yaml").write_text(CLAIMS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CLAIMS", root / "claims.yaml")
        # Other tests draw the figures.
        patch.setattr(build.figures, "draw", lambda table, folder: [])
        build.build(root)
    return root / "report" / "index.html"


@pytest.fixture(scope="module")
def root(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with its page."""
    folder = tmp_path_factory.mktemp("results")
    own = [Path(shutil.copytree(run, folder / "runs" / run.name)) for run in runs]
    built(folder, specs(own))
    return folder


@pytest.fixture(scope="module")
def shown(root: Path) -> Read:
    return Read((root / "report" / "index.html").read_text("utf-8"))


def test_the_page_is_valid_and_has_every_claim_system_table_and_view(
    root: Path, shown: Read
) -> None:
    claims: list[Claim] = read(root / "claims.yaml")
    assert len(set(shown.ids)) == len(shown.ids)
    assert {*page.VIEWS, *(f"claim-{claim.id}" for claim in claims)} <= {*shown.ids}
    assert all(claim.claim in shown.words for claim in claims)
    for label in ("shapes-sd3", "Flow-GRPO", "TAFS-GRPO"):
        assert label in shown.words
    assert {*shown.data["tables"]} == {content.ALL, "scores", "compute", "gains", "correlation"}
    assert {run["name"] for run in shown.data["runs"]} == {f.name for f in root.glob("runs/*")}
    assert "RANDOM WEIGHTS" not in shown.words


def test_the_policy_admits_the_pages_own_scripts_only(shown: Read) -> None:
    (policy,) = (
        str(attrs["content"])
        for tag, attrs in shown.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    _, *scripts = shown.scripts
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert rules["default-src"] == "'none'"
    assert not re.search(r"https?:|\*|unsafe-eval", policy)
    for _, attrs in shown.tags:
        assert not [key for key in attrs if key.startswith("on")]
        assert str(attrs.get("href", "#")).startswith("#") and "src" not in attrs
    assert not re.search(r"\beval\(|innerHTML|insertAdjacentHTML|document\.write\(", scripts[-1])


def test_copied_scripts_are_those_that_the_licences_list() -> None:
    listed = (ROOT / "docs" / "licences.md").read_text("utf-8")
    for name in page.SCRIPTS:
        file = page.HERE / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"| `tafs/report/page/{name}` |" in listed and f"`{digest}`" in listed
        assert (file.parent / f"{file.name.partition('.')[0]}.LICENSE").is_file()
    assert sum((page.HERE / name).stat().st_size for name in page.SCRIPTS) < 700_000


def test_texts_are_never_markup(own_runs: list[Path], tmp_path: Path) -> None:
    for run in own_runs:
        file = run / "samples.safetensors"
        tensors = load_file(file)
        captions = [HOSTILE for _ in tensors["prompts"]]
        save_file(tensors, file, {"captions": json.dumps(captions)})
    table, *_ = specs(own_runs, caption=HOSTILE, header=HOSTILE)
    rows = tuple(row.model_copy(update={"label": HOSTILE}) for row in table.rows)
    found = Read(built(tmp_path, [table.model_copy(update={"rows": rows})]).read_text("utf-8"))
    assert len(found.scripts) == 4 and "img" not in {tag for tag, _ in found.tags}
    assert HOSTILE in found.words
    assert found.data["images"]["sets"][0]["captions"][0] == HOSTILE
    assert found.data["matrices"]["scores"]["rows"][0] == f"{HOSTILE}, 28"


def test_random_weights_mark_the_page(own_runs: list[Path], tmp_path: Path) -> None:
    file = own_runs[0] / "evaluation.json"
    random = {**json.loads(file.read_bytes()), "random_weights": ["clip"]}
    file.write_text(json.dumps(random), encoding="utf-8")
    found = Read(built(tmp_path, specs(own_runs)[:1]).read_text("utf-8"))
    assert "RANDOM WEIGHTS: clip. These numbers and verdicts mean nothing." in found.words


def test_the_receipt_lists_the_page_and_its_images_and_equal_runs_give_equal_bytes(
    root: Path, own_runs: list[Path], tmp_path: Path
) -> None:
    written = receipts.read(root, "compare")
    assert written is not None and written.missing(root) == []
    listed = {name for name in written.files if name.startswith("report/")}
    on_disk = {f.relative_to(root).as_posix() for f in (root / "report").rglob("*") if f.is_file()}
    assert listed == on_disk and "report/index.html" in listed and len(listed) > 1
    built(tmp_path, specs(own_runs))
    for name in listed:
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), name


def test_a_cell_of_a_sheet_is_the_prompts_image(root: Path, shown: Read) -> None:
    run, setting = "tafs_grpo-0", "anneal-4"
    with safe_open(root / "runs" / run / "samples.safetensors", "numpy") as stored:
        images = stored.get_tensor(setting)
    of = shown.data["images"]["sets"][shown.data["images"]["runs"][run]["set"]]
    sheet = np.asarray(Image.open(root / "report" / "images" / f"{run}.{setting}.webp"))
    for place in (0, 5, len(images) - 1):
        row, column = divmod(place, of["columns"])
        cell = sheet[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
        assert np.array_equal(cell, images[place])
    assert len(of["captions"]) == len(of["tags"]) == len(images)


def test_many_large_images_are_made_smaller(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sprites, "BUDGET", 10_000)
    report = results.load(root)
    record, files = sprites.write(report, page.Systems(report), tmp_path)
    assert {file.parent for file in files} == {tmp_path / "images"} and not record["exact"]
    widths = {Image.open(file).width for file in files}
    (side,) = (width / record["sets"][0]["columns"] for width in widths)
    cells = len(files) * len(record["sets"][0]["tags"])
    assert 1 < side < 24 and cells * side**2 * sprites.PER_PIXEL <= 10_000


def test_the_matrix_holds_holms_p_values(root: Path, shown: Read) -> None:
    matrix = shown.data["matrices"]["scores"]
    table = results.load(root).tables[0]
    rows = [(table.systems[row], row) for row in table.spec.rows]
    values = [s.quality(r.sampler, r.nfe, "clip") for s, r in rows]
    pairs = [(i, j) for i, j, *_ in matrix["wins"]["clip"]]
    assert pairs == [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    tags = rows[0][0].scores.tags
    found = [stats.probability_of_improvement([values[i]], [values[j]], tags) for i, j in pairs]
    adjusted = stats.holm([one.p_value for one in found])
    for (_, _, value, _, _, p), estimate, expected in zip(
        matrix["wins"]["clip"], found, adjusted, strict=True
    ):
        assert value == pytest.approx(estimate.value, rel=1e-4)
        assert p == pytest.approx(expected, rel=1e-4)
    assert matrix["decides"] == [True] * len(rows)


@pytest.mark.parametrize(
    ("features", "score"),
    [
        (np.ones((7, 3)), 1),
        (np.eye(5), 5),
        (np.vstack([np.eye(2), 3 * np.eye(2)]), 2),  # lengths do not count
        ([[1, 0], [1, 0], [1, 0], [0, 1]], 4 / 3**0.75),  # shares of 3/4 and 1/4
    ],
)
def test_the_vendi_score_counts_different_images(features: Any, score: float) -> None:
    assert statistics.vendi_score(np.asarray(features, dtype=float)) == pytest.approx(score)


@pytest.mark.parametrize("features", [diversity._clip, lambda: diversity._pixels])
def test_a_model_of_one_image_has_no_diversity(features: Any) -> None:
    found = features()
    images = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
    assert statistics.vendi_score(found(images[:1].repeat(6, axis=0))) == pytest.approx(1, abs=1e-4)
    assert statistics.vendi_score(found(images)) > 1.01


def test_the_page_has_the_damage_to_every_system_of_a_table_with_gains(shown: Read) -> None:
    assert {*shown.data["diversity"]} == {*shown.data["gains"]}
    for found in shown.data["diversity"].values():
        kept = found["images"]
        assert found["features"] == "embedded CLIP" and kept == len(synthetic.TAGS) * synthetic.KEPT
        vendi, *panel = found["charts"]
        assert vendi["title"] == "Vendi score"
        assert [chart["title"] for chart in panel] == [
            f"{METRICS[name].title}, {METRICS[name].unit}" for name in statistics.PANEL
        ]
        for name, system in vendi["systems"].items():
            assert len(system["seeds"]) == len(shown.data["systems"][name]["runs"])
            assert all(1 <= score <= kept for score in system["seeds"])
            assert all(len(chart["systems"][name]["seeds"]) for chart in panel)


def test_long_curves_are_means_of_neighbours() -> None:
    iterations = [
        {"iteration": i, "kl": float(i), "rewards": {"clip": [0.0, 2.0]}, "seconds": {"total": 1}}
        for i in range(4 * content.POINTS)
    ]
    found = content._curves(iterations, trained_steps=1)
    assert {len(values) for values in found.values()} == {content.POINTS}
    assert found["kl"][:2] == [1.5, 5.5] and found["reward clip"][0] == 2.0
    assert {*found} == {"iteration", "kl", "reward clip", "seconds total"}


def test_a_divergence_is_the_mean_of_the_iterations_that_measure_all_trained_steps() -> None:
    iterations = [{"iteration": i, "kl": [0.0, 0.3, 0.9][i % 3]} for i in range(7)]
    found = content._curves(iterations, trained_steps=3)
    assert found["kl"] == pytest.approx([0.0, 0.15, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_iterations_without_a_divergence_are_left_out_of_its_curve() -> None:
    known = {0: 0.0, 5: 0.3, 10: 0.9, 12: 0.6}
    iterations = [
        {"iteration": i, "grad_norm": 1.0, **({"kl": known[i]} if i in known else {})}
        for i in range(13)
    ]
    found = content._curves(iterations, trained_steps=2)["kl"]
    assert [i for i, value in enumerate(found) if value is not None] == [*known]
    assert [value for value in found if value is not None] == pytest.approx([0, 0.15, 0.6, 0.75])


@pytest.mark.parametrize("comparisons", [1, 66, 500])
def test_any_number_of_comparisons_can_have_a_significant_one(comparisons: int) -> None:
    smallest = 2 / (1 + charts._resampling(comparisons).resamples)
    assert stats.holm([smallest] + [1.0] * (comparisons - 1))[0] <= (1 - stats.LEVEL) / 2


# -- in a browser ----------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(
    browser.PROGRAM is None, reason="no chromium on the PATH: apt-get install chromium"
)


@pytest.fixture(scope="module")
def opened(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.Page(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def url(root: Path, opened: browser.Page) -> Iterator[str]:
    """The page's address; afterwards, nothing has gone wrong and no request has left the page."""
    opened.requests.clear()
    opened.errors.clear()
    yield (root / "report" / "index.html").as_uri()
    assert opened.errors == []
    folder = (root / "report").as_uri()
    assert [r for r in opened.requests if not r.startswith((folder, "data:", "about:"))] == []


def moved(opened: browser.Page, slider: str, value: int) -> None:
    """Move a slider."""
    opened.run(
        f"(() => {{ const s = document.querySelector({json.dumps(slider)}); s.focus();"
        f" s.value = {value}; s.dispatchEvent(new Event('input'));"
        " s.dispatchEvent(new Event('change')); })()"
    )


def texts(page: browser.Page, selector: str) -> list[str]:
    """The texts of the visible elements of a selector."""
    script = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return list(page.run(f"{script}.filter((e) => e.checkVisibility()).map((e) => e.innerText)"))


SHOWN = {  # a view, and what it has
    "overview": "#compute-chart svg",
    "leaderboard": "#matrix td.sure, #steps svg",
    "leaderboard?budget=compute": "#budget svg",
    "leaderboard?budget=target": "#budget svg",
    "leaderboard?table=scores": "#pareto svg",
    "gallery": "#gallery-body .cell",
    "gallery?mode=trajectory": "#gallery-body .cell",
    "gallery?mode=absent": "#gallery-body .cell",
    "gallery?mode=wins": "#gallery-body .pair",
    "gallery?mode=vote": "#gallery-body .vote",
    "damage": "#damage-body svg",
    "runs": "#runs-body tbody tr",
    "runs?run=tafs_grpo-1": "#run-detail pre",
    "cards": "#cards .card",
}
AXE = importlib.util.find_spec("axe_playwright_python")


@in_browser
@pytest.mark.parametrize(("view", "selector"), SHOWN.items())
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_opens(
    opened: browser.Page, url: str, view: str, selector: str, width: int
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.call("Emulation.setDeviceMetricsOverride", **size)
    opened.open(f"{url}#{view}")
    assert opened.run(f"document.querySelectorAll({json.dumps(selector)}).length") > 0
    assert texts(opened, "[data-section] > h1") == texts(opened, f"#{view.partition('?')[0]} > h1")
    assert opened.run("document.documentElement.scrollWidth") <= width


@in_browser
@pytest.mark.skipif(AXE is None, reason="no axe-core: make setup")
@pytest.mark.parametrize(
    ("theme", "width", "rules"),
    [
        ("light", 1280, {}),
        ("dark", 390, {"runOnly": ["color-contrast", "scrollable-region-focusable"]}),
    ],
)
def test_every_view_is_accessible(
    opened: browser.Page, url: str, theme: str, width: int, rules: dict[str, Any]
) -> None:
    assert AXE is not None and AXE.submodule_search_locations is not None
    (folder,) = AXE.submodule_search_locations
    axe = (Path(folder) / "axe.min.js").read_text("utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.call("Emulation.setDeviceMetricsOverride", **size)
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    opened.call("Emulation.setEmulatedMedia", features=scheme)
    opened.open(url)
    opened.run(f"{axe}; 0")
    options = json.dumps({"resultTypes": ["violations"], **rules})
    for view in SHOWN:
        opened.run(
            "new Promise((done) => { addEventListener('hashchange', () => setTimeout(done));"
            f" location.hash = {json.dumps(view)}; }})"
        )
        found = opened.run(
            f"axe.run(document, {options}).then(({{violations}}) =>"
            " violations.map(({id, nodes}) => `${id}: ${nodes[0].html}`))"
        )
        assert found == [], view
    opened.call("Emulation.setEmulatedMedia", features=[])


@in_browser
def test_rows_are_sorted_and_filtered_and_the_address_keeps_it(
    opened: browser.Page, url: str
) -> None:
    opened.open(f"{url}#leaderboard?table=scores")
    assert (
        opened.run("document.querySelector('.sheet:not([hidden]) th[data-sort=clip]').cellIndex")
        == 7
    )
    rows = ".sheet:not([hidden]) tbody tr"

    def values() -> list[float]:
        cells = f"[...document.querySelectorAll({json.dumps(rows)})].map((r) => r.cells[7])"
        return list(opened.run(f"{cells}.map((cell) => Number(cell.dataset.value))"))

    for order in (True, False):
        opened.run("document.querySelector('.sheet:not([hidden]) th[data-sort=clip]').click()")
        assert values() == sorted(values(), reverse=order) and len(set(values())) > 2
    assert "sort=clip&order=up" in opened.run("location.hash")
    opened.run(
        "(() => { const s = document.querySelector('[data-key=nfe]'); s.value = '28';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert [row.split()[0] for row in texts(opened, rows)] == ["shapes-sd3"]
    address = opened.run("location.href")
    opened.open(address)
    assert [row.split()[0] for row in texts(opened, rows)] == ["shapes-sd3"]
    opened.run("document.querySelector('[data-key=budget][data-value=compute]').click()")
    assert texts(opened, ".sheet h2") == ["Compute"]


@in_browser
def test_a_budget_ranks_the_methods_and_a_target_has_its_cost(
    opened: browser.Page, url: str, shown: Read
) -> None:
    points = shown.data["compute"]["compute"]["clip"]
    opened.open(f"{url}#leaderboard?budget=compute&quality=clip")

    def names() -> list[str]:
        labels = "[...document.querySelectorAll('#budget svg g[text-anchor=end] text')]"
        found = list(opened.run(f"{labels}.map((label) => label.textContent)"))
        return [text for text in found if not text.endswith("→")]  # the axis's own label

    costs = sorted({x for values in points.values() for x, *_ in values if x > 0})
    for place in (0, len(costs) - 1):
        moved(opened, "[data-key=at]", place)
        last = {
            shown.data["systems"][key]["name"]: [v for x, v, *_ in values if x <= costs[place]][-1]
            for key, values in points.items()
        }
        assert names() == sorted(last, key=lambda name: -last[name])
        assert opened.run("document.activeElement.dataset.key") == "at"
    opened.open(f"{url}#leaderboard?budget=target&quality=clip")
    best = max(v for values in points.values() for _, v, *_ in values)
    moved(opened, "[data-key=target]", 40)
    reached = [
        shown.data["systems"][key]["name"]
        for key, values in points.items()
        if any(v >= float(f"{best:.3g}") for _, v, *_ in values)
    ]
    assert names() == reached


@in_browser
def test_images_load_when_they_are_looked_at_and_the_slider_changes_their_steps(
    opened: browser.Page, url: str
) -> None:
    opened.open(f"{url}#overview")
    assert not [r for r in opened.requests if r.endswith(".webp")]
    opened.open(f"{url}#gallery")
    opened.wait("document.querySelector('.cell').style.backgroundImage.includes('-4.webp')")
    moved(opened, "#gallery [data-key=nfe]", 0)
    opened.wait("document.querySelector('.cell').style.backgroundImage.includes('-1.webp')")
    assert "nfe=1" in opened.run("location.hash")
    opened.wait_for_request("-1.webp")


@in_browser
def test_a_run_leads_to_its_copy_in_mlflow_at_any_address(
    opened: browser.Page, url: str, root: Path, tmp_path: Path
) -> None:
    names = [run.name for run in (root / "runs").iterdir()]
    opened.open(f"{url}#runs")
    links = "[...document.querySelectorAll('#runs-body td:last-child a')].map((a) => a.href)"
    tracked = (root / "tracked.html").as_uri()
    assert set(opened.run(links)) == {f"{tracked}#{name}" for name in names}
    name, *others = names
    copy = RunInfo("c0ffee", "7", "me", "FINISHED", 0, None, "active")
    index_page.write(tmp_path / "tracked.html", names, {name: copy}, Path("results/mlflow"))
    opened.open(f"{(tmp_path / 'tracked.html').as_uri()}#{name}")
    assert texts(opened, ":target td") == [name, "open"]
    assert texts(opened, "td:last-child").count("not copied") == len(others)
    for typed, start in (("", None), ("http://there:8/mlflow/", "http://there:8/mlflow")):
        address = f"Object.assign(document.getElementById('address'), {{value: {typed!r}}})"
        opened.run(f"{address}.dispatchEvent(new Event('input'))")
        found = opened.run("document.querySelector('[data-path]').getAttribute('href')")
        assert found == (start and f"{start}/#/experiments/7/runs/c0ffee")
    opened.requests.clear()  # of a page elsewhere


@in_browser
def test_snapshots_and_steps_of_trajectories_are_shown(
    opened: browser.Page, url: str, root: Path, shown: Read
) -> None:
    trained, base = "tafs_grpo-0", "base-0"
    sheets = shown.data["images"]["runs"][trained]["sheets"]
    snapshots = sorted(int(name.partition("@")[2]) for name in sheets if "@" in name)
    opened.open(f"{url}#gallery?systems={shown.data['runs'][-1]['system']}")
    for place, sheet in enumerate((base, *(f"@{after}." for after in snapshots), "anneal-4.")):
        moved(opened, "[data-key=after]", place)
        address = opened.run("document.querySelector('#gallery-body .cell').dataset.sheet")
        assert sheet in opened.run(f"decodeURIComponent({json.dumps(address)})")
    found = shown.data["images"]["trajectories"][base]
    opened.open(f"{url}#gallery?mode=trajectory&metric=clip")
    cells = opened.run("document.querySelectorAll('#gallery-body .cell').length")
    assert cells == found["steps"] * len(found["captions"])
    rewards = results.load(root).tables[-1].results[0].trajectory_rewards
    of = rewards[(rewards["metric"] == "clip") & (rewards["prompt"] == 1)].sort_values("step")
    assert found["scores"]["clip"][1] == pytest.approx(list(of["value"]), rel=1e-4)


@in_browser
def test_votes_are_cast_with_the_keyboard(opened: browser.Page, url: str) -> None:
    opened.open(f"{url}#gallery?mode=vote")
    opened.run("localStorage.clear()")
    opened.open(f"{url}#gallery?mode=vote")
    for key, count in (("ArrowLeft", 1), ("ArrowDown", 2), ("ArrowRight", 3), ("u", 2)):
        opened.press(key)
        opened.wait(f"document.getElementById('votes-count').innerText.startsWith('{count} vote')")
    kept = opened.run("localStorage.getItem(Object.keys(localStorage)[0])")
    assert [vote["winner"] for vote in json.loads(kept)] == ["left", "tie"]
    systems = opened.run("document.querySelector('.vote').innerText")
    assert not re.search("GRPO|shapes-sd3", systems)


@in_browser
def test_all_views_are_printed_with_their_images(opened: browser.Page, url: str) -> None:
    opened.open(f"{url}#cards")
    opened.run("window.print = () => { window.asked = true; }")
    opened.run("document.getElementById('print').click()")
    opened.wait("window.asked")
    opened.call("Emulation.setEmulatedMedia", media="print")
    assert opened.run(
        f"{json.dumps(page.VIEWS)}.every((v) => document.getElementById(v).innerText)"
    )
    cells = "[...document.querySelectorAll('.cell')]"
    assert opened.run(f"{cells}.length > 0 && {cells}.every((c) => c.style.backgroundImage)")
    assert opened.run("document.querySelectorAll('#damage-body svg').length > 0")
    assert texts(opened, "header, button, .controls") == []
    opened.call("Emulation.setEmulatedMedia", media="")
    opened.run("dispatchEvent(new Event('afterprint'))")
    assert texts(opened, "[data-section] > h1") == ["Cards"]


@in_browser
def test_the_theme_changes_and_is_kept(opened: browser.Page, url: str) -> None:
    opened.open(url)
    seen = set()
    for _ in range(3):
        opened.run("document.getElementById('theme').click()")
        seen.add(opened.run("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2
