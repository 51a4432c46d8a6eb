"""The files that say what is installed agree with each other, and the package they build works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = (
    "pyproject.toml",
    "requirements.txt",
    "requirements-nodeps.txt",
    "constraints.txt",
    "environment.yml",
    "environment.post-deploy.sh",
    "Makefile",
    ".ci/run",
    ".gitignore",
    ".github/workflows/ci.yml",
    ".pre-commit-config.yaml",
)
CUDA = ("nvidia-", "cuda-", "triton")  # torch asks for these where it is a CUDA build


def lines(name: str) -> list[str]:
    """The lines of a requirements file, without comments and options."""
    stripped = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in stripped if line and not line.startswith("-")]


def pinned(specs: list[str]) -> dict[str, Version]:
    """Canonical name -> version of requirements that each pin one version."""
    versions: dict[str, Version] = {}
    for spec in map(Requirement, specs):
        [specifier] = spec.specifier
        assert specifier.operator == "==", spec
        name = canonicalize_name(spec.name)
        assert name not in versions, f"{name} twice"
        versions[name] = Version(specifier.version)
    return versions


def declared(*extras: str) -> dict[str, Requirement]:
    """Canonical name -> requirement of pyproject.toml: the dependencies and these extras."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += PROJECT["optional-dependencies"][extra]
    specs = [Requirement(text) for text in listed]
    return {canonicalize_name(s.name): s for s in specs if s.name != "tafs"}


EVERYTHING = ("workflow", "imagereward", "quantize", "ocr", "test")


@pytest.fixture(scope="module")
def lock() -> dict[str, Version]:
    return pinned(lines("constraints.txt"))


@pytest.fixture(scope="module")
def conda() -> tuple[dict[str, str], list[str]]:
    """environment.yml: conda's packages with their versions, and the list for pip."""
    text = (ROOT / "environment.yml").read_text()
    *packages, last = YAML(typ="safe").load(text)["dependencies"]
    return dict(entry.partition("=")[::2] for entry in packages), last["pip"]


# -- what is required ------------------------------------------------------------------------------


def test_the_lock_satisfies_every_requirement(lock: dict[str, Version]) -> None:
    for name, spec in declared(*EVERYTHING).items():
        assert spec.specifier.contains(lock[name]), spec


def test_requirements_txt_installs_everything_at_the_locked_versions() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert re.findall(r"^[^#\n].*", text, re.MULTILINE) == ["-c constraints.txt", "-e .[test]"]
    [inherited] = [
        Requirement(text)
        for text in PROJECT["optional-dependencies"]["test"]
        if text.startswith("tafs[")
    ]
    assert inherited.extras == {"workflow", "imagereward", "quantize", "ocr"}


def test_the_installed_versions_are_the_locked_ones(lock: dict[str, Version]) -> None:
    for name in declared(*EVERYTHING):
        assert Version(version(name)).public == lock[name].public, name


def test_the_lock_leaves_the_build_of_torch_to_the_machine(lock: dict[str, Version]) -> None:
    assert all(version.local is None for version in lock.values())
    for spec in map(Requirement, lines("constraints.txt")):
        if spec.name.startswith(CUDA):
            assert spec.marker is not None, spec
            assert not spec.marker.evaluate({"sys_platform": "darwin"}), spec


def test_packages_without_dependencies_are_pinned_and_not_locked(lock: dict[str, Version]) -> None:
    versions = pinned(lines("requirements-nodeps.txt"))
    assert set(versions) == {"axe-playwright-python", "hpsv2", "image-reward"}
    assert not set(versions) & set(lock)
    script = (ROOT / "environment.post-deploy.sh").read_text()
    assert re.findall(r"\S+==\S+", script) == lines("requirements-nodeps.txt")


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (("tafs", "baselines", "benchmarks"), ("workflow", "imagereward", "quantize", "ocr")),
        (("tests",), EVERYTHING),
    ],
)
def test_every_imported_package_is_declared(
    folders: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    distributions = packages_distributions()
    own = {"tafs", "baselines", "support"}
    own |= {
        file.stem for folder in ("tests", "benchmarks") for file in ROOT.glob(f"{folder}/**/*.py")
    }
    known = {*declared(*extras), *pinned(lines("requirements-nodeps.txt"))}
    missing = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names:
                offered = {canonicalize_name(name) for name in distributions.get(top, [top])}
                if not offered & known:
                    missing.add(f"{file.relative_to(ROOT)}: {top}")
    assert missing == set()


# -- conda -----------------------------------------------------------------------------------------


def test_environment_yml_holds_the_lock_except_for_cuda(
    conda: tuple[dict[str, str], list[str]],
) -> None:
    packages, pip = conda
    assert pip == [line for line in lines("constraints.txt") if not line.startswith(CUDA)]
    assert set(packages) == {"python", "git", "make", "pip"}
    [locked_for] = set(re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text()))
    assert packages["python"] == locked_for
    assert PROJECT["requires-python"] == f">={locked_for}"


def test_snakemake_finds_the_post_deploy_script() -> None:
    from snakemake.sourcecache import infer_source_file

    script = infer_source_file(str(ROOT / "environment.yml")).replace_suffix(
        [".yaml", ".yml"], ".post-deploy.sh"
    )
    assert os.access(script.get_path_or_uri(secret_free=True), os.X_OK)


def test_the_post_deploy_script_outside_the_project_names_the_remedy(tmp_path: Path) -> None:
    script = ROOT / "environment.post-deploy.sh"
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    expected = f"{tmp_path} is not the folder of the project; call snakemake or this script there"
    assert done.stderr == f"{expected}\n"


# -- the package -----------------------------------------------------------------------------------


def test_the_wheel_holds_the_rooms_their_data_and_the_shipped_methods(tmp_path: Path) -> None:
    """Built without a network from a copy, since setuptools writes beside the sources."""
    source = tmp_path / "source"
    for name in ("tafs", "baselines"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    [wheel] = tmp_path.glob("tafs-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        content = archive.read("tafs/baselines/__init__.py")
    files = {f.relative_to(source).as_posix() for f in source.glob("tafs/**/*") if f.is_file()}
    files |= {f"tafs/baselines/{f.name}" for f in source.glob("baselines/*.py")}
    assert packed == files
    assert content == (ROOT / "baselines" / "__init__.py").read_bytes()


def test_the_licence_and_the_version_are_stated_alike() -> None:
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# -- make and continuous integration ---------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_file_holds_no_path_of_a_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.findall(r"(?<![\w.])/(?:home|root|opt|work|tmp|Users|usr/local)\b\S*", text)
    assert "file://" not in text


def test_make_knows_and_explains_every_target() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    [phony] = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^([a-z-]+) +\S", helped.stdout, re.MULTILINE)) == set(phony.split())
    for target in phony.split():
        command = ["make", "-n", "-B", target, "ARGS=", "NAME=x"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    # Another folder, so that an environment that already exists does not matter.
    command = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("failing", "called"),
    [
        ("", {"setup", "test", "test-slurm"}),
        ("setup", {"setup"}),
        ("test", {"setup", "test", "test-slurm"}),
        ("test-slurm", {"setup", "test", "test-slurm"}),
    ],
)
def test_continuous_integration_runs_all_tests_and_fails_with_any(
    failing: str, called: set[str], tmp_path: Path
) -> None:
    calls, make = tmp_path / "calls", tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1" >>"{calls}"\ntest "$1" != "{failing}"\n')
    installed = tmp_path / "slurmctld"
    for program in (make, installed):
        program.touch()
        program.chmod(0o755)
    around = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=around, capture_output=True)
    assert (done.returncode != 0) == bool(failing)
    assert set(calls.read_text().split()) == called


def test_hosted_integration_tests_every_supported_version_of_python() -> None:
    hosted = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "ci.yml")
    steps = [step.get("run") for job in hosted["jobs"].values() for step in job["steps"]]
    assert {"make lint", "make test"} <= set(steps)
    supported = {
        text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)
    }
    tested = {v for job in hosted["jobs"].values() for v in job["strategy"]["matrix"]["python"]}
    assert tested == supported


def test_results_are_ignored_except_for_the_reference_run() -> None:
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    assert patterns.index("/results/*") < patterns.index("!/results/reference/")


def test_the_json_schema_of_config_yaml_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tafs.experiment.json_schema"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "workflow" / "schemas" / "config.schema.json").read_text(), (
        "run `make schema`"
    )
