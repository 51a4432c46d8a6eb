"""The whole tree: style, types, nothing unsafe or left over, and a README that tells the truth."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "snakefmt --check workflow",
    "snakemake --lint",
)
SHIPPED = ("tafs", "baselines", "workflow", "benchmarks")
LEFTOVER = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|HA[C]K)\b")  # which does not match itself
MACHINE_PATH = re.compile(r"(?<![\w.:$}])/(home|root|Users|work|tmp|mnt|scratch|private)/")


def tracked(*folders: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def text_of(file: Path) -> str:
    """A tracked file's text; "" for weights and images."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CHECKS)
def test_the_tree_passes(command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_the_same_checks():
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    commands = [line.strip().removeprefix("$(RUN) ") for line in recipe.splitlines()[1:]]
    assert commands == list(CHECKS)


# -- leftovers -------------------------------------------------------------------------------------


def test_no_tracked_file_holds_a_leftover_or_a_path_of_one_machine():
    found = {
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in tracked()
        for pattern in (LEFTOVER, MACHINE_PATH)
        for match in pattern.finditer(text_of(file))
    }
    assert found == set()


@pytest.mark.parametrize("path", ["home/me/weights", "work/x", "tmp/out.png", "Users/a/b"])
def test_a_path_of_one_machine_is_recognised(path):
    assert MACHINE_PATH.search(f'open("/{path}")')
    assert not MACHINE_PATH.search(f'open("results/{path}")')
    assert not MACHINE_PATH.search(f"https://example.org/{path}")


def stubs(sources: dict[str, str]) -> list[str]:
    """Where a bare NotImplementedError is raised by anything but a hook that a class overrides."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    classes = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
    methods = [f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)]
    names = [method.name for method in methods]
    hooks = {id(line) for m in methods if names.count(m.name) > 1 for line in m.body}
    return [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and id(node) not in hooks
        if isinstance(node.exc, ast.Name) and node.exc.id == "NotImplementedError"
    ]


def test_only_hooks_are_left_to_be_implemented():
    sources = {str(f.relative_to(ROOT)): text_of(f) for f in tracked("*.py")}
    assert stubs(sources) == []


def test_a_stub_is_told_from_a_hook():
    raising = "class A:\n    def f(self):\n        raise NotImplementedError\n"
    assert stubs({"a.py": raising}) == ["a.py:3"]
    assert stubs({"a.py": "def f():\n    raise NotImplementedError\n"}) == ["a.py:2"]
    assert stubs({"a.py": raising, "b.py": "class B(A):\n    def f(self): return 1\n"}) == []


# -- safety ----------------------------------------------------------------------------------------

FORBIDDEN = (
    r"\b(c?[Pp]ickle|cloudpickle|dill|joblib|marshal|shelve)\b",
    r"\bweights_only = (?!True\b)",
    r"\b(shell|trust_remote_code) = (?!False\b)",
    r"\byaml \. (full|unsafe)_load\w*",
    r"\byaml \. load(_all)? \((?! [^()]*\bLoader\b)",
    r"\bos \. (system|popen)\b",
    r"(?<!\. )(?<!def )\b(eval|exec|compile|__import__) \(",
    r"(?<!\. )\btorch \. load \((?![^()]*(?:\([^()]*\)[^()]*)*\bweights_only = True\b)",
    r"\ballow_pickle = (?!False\b)",
    r"\b(read|to)_pickle\b",
    r"\btempfile \. mktemp\b",
    r"\bverify = False\b",
    r"\b_create_unverified_context\b",
    r"\bos \. (spawn|posix_spawn)\w*",
    r"\bsubprocess \. (getoutput|getstatusoutput)\b",
    r"\bextractall\b",
)
# What attacks with such a file has to be able to say so.
ATTACKS = {
    "tests/test_style.py",
    "tests/torture/test_malicious_files.py",
    "tests/torture/test_hostile_requests.py",
}


def unsafe(source: str) -> list[str]:
    """What loads code or runs it unasked, in Python or Snakemake; comments and strings may."""
    kept = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = " ".join(token.string for token in tokens if token.type in kept)
    # A loader that derives from the safe one is written as plain `Loader` below.
    safe = re.findall(r"\bclass (\w+) \( yaml \. C?SafeLoader \)", code)
    code = re.sub(r"\b(yaml \. )?Loader\b", "Unsafe", code.replace("Loader =", ""))
    for name in ("yaml . SafeLoader", "yaml . CSafeLoader", "SafeLoader", *safe):
        code = re.sub(rf"(?<!class )(?<![\w.] )\b{re.escape(name)}\b", "Loader", code)
    found = [match.group() for rule in FORBIDDEN for match in re.finditer(rule, code)]
    return found + listening_to_all(source)


def listening_to_all(source: str) -> list[str]:
    """Addresses from which other machines are served."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    strings = [token.string for token in tokens if token.type == tokenize.STRING]
    return [text for text in strings if re.search(r"(?<![\d.])0\.0\.0\.0(?![\d.])", text)]


def test_nothing_unpickles_or_runs_what_it_reads():
    files = [
        f
        for f in tracked(*SHIPPED, "tests")
        if f.suffix in (".py", ".smk") or f.name == "Snakefile"
    ]
    assert len(files) > 20
    found = {str(f.relative_to(ROOT)): unsafe(text_of(f)) for f in files}
    assert {name for name, what in found.items() if what} <= ATTACKS, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "os.system(command)",
        "torch.load(file)",
        "torch.load(file, map_location=torch.device('cpu'))",
        "np.load(file, allow_pickle=True)",
        "pd.read_pickle(file)",
        "tempfile.mktemp()",
        "requests.get(url, verify=False)",
        "archive.extractall(folder)",
        "server.bind(('0.0.0.0', 80))",
        "subprocess.getoutput(command)",
        "__import__(name)",
        "value = eval(text)",
        "rule a:\n    run:\n        exec(text)",
    ],
)
def test_an_unsafe_call_is_recognised(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "# no pickle, no shell=True",
        "text = 'yaml.load(text)'",
        "torch.load(file, weights_only=True)",
        "safetensors.torch.load(content)",
        "torch.load(path(name), map_location=torch.device('cpu'), weights_only=True)",
        "np.load(file, allow_pickle=False)",
        "re.compile(pattern)",
        "version = '10.0.0.0.1'",
        "model.eval()",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "class Strict(yaml.SafeLoader):\n    pass\nyaml.load(text, Strict)",
        "rule a:\n    shell:\n        'true'",
    ],
)
def test_a_safe_call_passes(source):
    assert unsafe(source) == []


# -- the README ------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """Text by second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def named_in_tree(block: str) -> list[str]:
    """Every path of a directory tree in which a line holds names, a gap, and what they are.

    Names in the description that look like files or folders are of that folder.
    """
    found: list[str] = []
    folder = ""
    for line in filter(None, block.splitlines()):
        names, _, description = line.strip().partition("  ")
        inside = folder if line.startswith(" ") else ""
        found += [inside + name for name in names.split()]
        if not inside and names.endswith("/"):
            folder = names
            listed = re.findall(r"[\w.-]+\.md\b|Snakefile|\b\w+/", description)
            found += [folder + name for name in listed]
    return found


README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = sections(README)["The tree"].split("```")[1]


@pytest.mark.parametrize("path", named_in_tree(TREE))
def test_every_path_in_the_readmes_tree_exists(path):
    assert (ROOT / path).exists()


def test_the_readmes_tree_is_read_completely():
    block = "a.yaml  settings\nsrc/  the rest\n  b.py c.py\n  d/  two\ndocs/  e.md, parts/ of it\n"
    names = [
        "a.yaml",
        "src/",
        "src/b.py",
        "src/c.py",
        "src/d/",
        "docs/",
        "docs/e.md",
        "docs/parts/",
    ]
    assert named_in_tree(block) == names


def test_every_module_is_named_in_the_readmes_tree():
    modules = {f"tafs/{f.name}" for f in tracked("tafs/*.py") if f.parent == ROOT / "tafs"}
    assert modules - {"tafs/__init__.py"} <= set(named_in_tree(TREE))


def test_every_relative_link_leads_somewhere():
    broken = [
        f"{file.relative_to(ROOT)}: {target}"
        for file in tracked("*.md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(file))
        if "://" not in target and not (file.parent / target).exists()
    ]
    assert broken == []


def test_every_source_path_in_the_documents_exists():
    pattern = re.compile(rf"(?<![\w/.-])(?:{'|'.join(SHIPPED)}|docs|tests)/[\w./-]*\w")
    broken = {
        f"{file.relative_to(ROOT)}: {path}"
        for file in tracked("*.md")
        for path in pattern.findall(text_of(file))
        if not (ROOT / path).exists()
    }
    assert broken == set()


def test_the_readmes_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    opening = re.findall(r"^make ([a-z-]+)", sections(README)[""], flags=re.MULTILINE)
    assert opening == ["all", "test"]
    assert set(re.findall(r"[`\n]make ([a-z-]+)", README)) <= targets
