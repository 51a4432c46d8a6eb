"""README, guides and the notebook: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support import documents
from support.documents import ROOT, Block

from tafs import cli, experiment
from tafs.experiment.schema import Config
from tafs.experiment.variants import Variants
from tafs.methods import ForwardProcess, Method, PolicyGradient, registry

NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"

# Code that is not run here, by its first line, and why.
NOT_RUN = {
    "PLUGIN = ModelPlugin(": "parts of a file of `tafs new model`; tests/models runs one",
    "class SanaTrainedBackbone(Backbone):": "as above",
    "METRIC = Metric(": "parts of a file of `tafs new reward`; tests/rewards runs one",
    'PROMPT_SET = PromptSet(train=train, test=test, assets=("shapes", "hub"))': "a part of a file "
    "of `tafs new prompts`; tests/data runs one",
    "import json, pathlib, sys": "tests/tracking/test_run_view.py runs it on a journal",
}
# Commands that are run, after the code of their page. The others only parse: they set up an
# environment, train or evaluate for minutes, search, listen, need a GPU or a network, or run tests.
# tests/workflow and tests/evaluation run their work at a smaller size.
RUN = ("tafs score",)
PUBLISHED = "--scale one-gpu"  # needs a download; tests/evaluation/test_image_scores.py runs it


def run(text: str, folder: Path, name: str) -> dict[str, Any]:
    """Run code as a program in the present folder; return its names."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    return runpy.run_path(str(file), run_name=f"documented_{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working folder in which the checkout's files are found under their own names."""
    made = tmp_path_factory.mktemp("documents")
    for name in ("config.yaml", "tafs", "baselines", "claims.yaml", "resources.yaml"):
        (made / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


@pytest.fixture(scope="module")
def first_steps(folder: Path) -> dict[str, Any]:
    """The notebook's names after its last cell; its adapter is results/shapes/runs/NAME."""
    found = run("\n".join(documents.code_of(NOTEBOOK)), folder, "notebook")
    run_folder = folder / "results" / "shapes" / "runs" / "NAME"
    run_folder.parent.mkdir(parents=True)
    run_folder.symlink_to(found["run"].folder)
    return found


def test_the_notebook_compares_its_adapter_with_the_base_model(first_steps: dict[str, Any]) -> None:
    before, after = first_steps["before"], first_steps["after"]
    assert before.shape == after.shape == (60, 3, 24, 24) and not before.equal(after)
    assert {*first_steps["compared"]} == {"pickscore", "clip", "geneval"}
    assert all(found.low < found.value < found.high for found in first_steps["compared"].values())


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
    assert all(cell.get("execution_count") is None for cell in cells)


RUNNABLE = [b for b in documents.blocks("python") if b.text.splitlines()[0] not in NOT_RUN]


@pytest.mark.parametrize("page", sorted({block.page for block in RUNNABLE}))
def test_the_code_of_a_page_runs(page: str, folder: Path, request: Any) -> None:
    if page == "docs/adapters.md":  # it loads the notebook's adapter
        request.getfixturevalue("first_steps")
    for number, block in enumerate(b for b in RUNNABLE if b.page == page):
        names = run(block.text, folder, f"{Path(page).stem.replace('-', '_')}_{number}")
        if method := names.get("METHOD"):
            assert issubclass(method, Method) and method().nfe_theta > 0
    for found, command in documents.commands():
        if found == page and command.startswith(RUN) and PUBLISHED not in command:
            with pytest.raises(SystemExit) as ended:
                cli.main(shlex.split(command)[1:])
            assert ended.value.code == 0, command


def test_every_exception_is_about_a_block_that_exists() -> None:
    shown = {block.text.splitlines()[0] for block in documents.blocks("python")}
    assert {*NOT_RUN} <= shown
    for block in documents.blocks("python"):
        compile(block.text.replace("{...}", "{}"), str(block), "exec")


def test_tafs_status_shows_every_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["status"])
    assert ended.value.code == 0
    assert re.search(r"scale shapes: .* jobs done", capsys.readouterr().out)


COMMANDS = sorted({command for _, command in documents.commands()})


@pytest.mark.parametrize("program", documents.PROGRAMS)
def test_every_command_parses(program: str) -> None:
    own = [command for command in COMMANDS if command.split()[0] == program]
    assert own
    refused = []
    for command in own:
        try:
            documents.parse(command)
        except (SystemExit, Exception) as error:
            refused.append(f"{command}: {error}")
    assert refused == []


def test_every_other_command_is_known() -> None:
    programs = {re.sub(r"^[A-Z_]+=\S+ ", "", command).split()[0] for command in COMMANDS}
    assert programs <= {*documents.PROGRAMS, *documents.OTHERS}


@pytest.mark.parametrize("block", documents.blocks("yaml"), ids=str)
def test_settings_have_the_keys_of_the_configuration(block: Block) -> None:
    found = YAML(typ="safe").load(block.text)
    if set(found) == {"prompts"}:  # a key of a scale
        found = {"scales": {"shapes": found}}
    assert set(found) <= set(Config.model_fields)


def test_entry_points_and_json_are_readable() -> None:
    for block in documents.blocks("toml"):
        [group] = tomllib.loads(block.text)["project"]["entry-points"]
        assert group in {f"tafs.{kind}" for kind in ("methods", "rewards", "prompts", "models")}
    for block in documents.blocks("json"):
        assert json.loads(block.text)


# -- what pages say --------------------------------------------------------------------------------


METHOD_PAGES = {f.stem.replace("-", "_"): f for f in (ROOT / "docs" / "methods").glob("[!R]*.md")}


def test_every_method_has_a_page() -> None:
    others = (ROOT / "docs" / "methods-of-the-field.md").read_text("utf-8")
    named = {*METHOD_PAGES, *re.findall(r"\w+", others)}
    assert {*registry.names()} <= named


@pytest.mark.parametrize("name", sorted(METHOD_PAGES))
def test_a_methods_page_has_all_of_its_own_settings(name: str) -> None:
    text = METHOD_PAGES[name].read_text("utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE))
    method = registry.method_class(name)
    base = next(b for b in (PolicyGradient, ForwardProcess, Method) if issubclass(method, b))
    inherited = {f.name: f.default for f in dataclasses.fields(base)}
    own = {
        f.name: str(f.default)
        for f in dataclasses.fields(method)
        if f.name not in inherited or f.default != inherited[f.name]
    }
    assert listed == own


def test_the_methods_have_their_evaluations_and_costs() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[.*\]\((\S+)\.md\) \|.*\| (.+) \| (.+) \|$", text, re.MULTILINE)
    expected = set()
    for name, page in METHOD_PAGES.items():
        method = registry.method_class(name)()
        nfe = "-" if method.nfe_old is None else f"{method.nfe_old:g}, {method.nfe_theta}"
        shared = 2 * (method.cost(1) - method.cost(2))  # a part of the cost is shared / G
        own = f"{method.cost(1) - shared:g}"
        expected.add((page.stem, nfe, f"{own} + {shared:g} / G" if shared else own))
    assert {*listed} == expected


def test_the_shared_settings_are_listed() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text("utf-8")
    for field in (*dataclasses.fields(PolicyGradient), *dataclasses.fields(ForwardProcess)):
        assert f"`{field.name}`" in text, field.name


def test_the_table_of_hyperparameters_has_the_values_of_the_scale_paper() -> None:
    text = (ROOT / "docs" / "reading-the-paper.md").read_text("utf-8")
    _, _, table = text.partition("| method | learning rate |")
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[2:]]
    config = experiment.load({"scale": "paper"}, ROOT / "config.yaml").config
    variants = Variants(config)
    methods = [variants.method(name) for name in config.experiments["table2"].methods]
    by_title = {method.TITLE: method for method in methods}
    assert {row[0] for row in rows} == by_title.keys()
    for title, *cells in rows:
        method = by_title[title]
        shown = [cell.split()[0] for cell in cells]
        noise = getattr(method, "eta", None)
        if isinstance(method, PolicyGradient) and method.sampler == "anneal":
            noise = None  # it has no noise level
        found = (method.learning_rate, getattr(method, "clip_range", 0), noise, method.ema)
        for cell, value in zip(shown, (*found, method.updates), strict=True):
            assert (0.0 if cell in ("none", "drawn") else float(cell)) == (value or 0), (
                title,
                cell,
            )


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    errors = text.partition("## Without a message")[0]
    shown = re.findall(r"^\| (?:`` (.+?) ``|`(.+?)`) \|", errors, re.MULTILINE)
    assert len(shown) > 80
    known = documents.messages()
    absent = [m for m in map("".join, shown) if not any(m in text for text in known)]
    assert absent == []


# -- the site --------------------------------------------------------------------------------------


def pages(entry: Any) -> Iterator[str]:
    """The files of a nav of mkdocs.yml."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from pages(inner)


def test_the_sites_menu_has_every_page_once() -> None:
    site = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text("utf-8"))
    docs = ROOT / "docs"
    files = [f.relative_to(docs) for f in docs.rglob("*") if f.suffix in (".md", ".ipynb")]
    # The notebook becomes a page.
    assert sorted(pages(site["nav"])) == sorted(f.with_suffix(".md").as_posix() for f in files)


def anchor(heading: str) -> str:
    """A heading's identifier, as GitHub and the site make it."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain))


def test_every_link_to_a_section_finds_its_heading() -> None:
    broken = []
    for page in documents.PAGES:
        file = ROOT / page
        for target, section in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", file.read_text("utf-8")):
            linked = (file.parent / target) if target else file
            if "://" in target or linked.suffix != ".md":
                continue
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
            if section not in map(anchor, headings):
                broken.append(f"{page}: {target}#{section}")
    assert broken == []
