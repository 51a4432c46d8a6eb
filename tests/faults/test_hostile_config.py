"""config.yaml in every broken form: one line that names the place and the remedy, and no job."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tafs.common import yaml_files
from tafs.orchestration import graph

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (ROOT / "config.yaml").read_bytes()
# Without aliases: what shares a value by one must not change with it.
RAW = json.dumps(yaml.safe_load(SHIPPED))
SCALES = tuple(json.loads(RAW)["scales"])
HANG_S = 60
LONGEST = 400  # characters of a refusal besides the file's own name
# What a person may do about it.
REMEDY = re.compile(
    r"\b(did you mean|available|add it|should|choose|correct it|save it|shorten it|keep one|use|"
    r"write|put|give|needs?|needed|takes no|is taken|one of|at least|at most|must be|cannot be|"
    r"leads round|is not between|is less than|is neither|leaves no|no table|is not of the world|"
    r"no backbone for|no prompt set)\b"
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**18,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "../../etc",
    "a\nb",
    "a\x00b\x1b[31m",
    "\u202etxt.yaml",
    "שלום",
    "x" * 20_000,
    "{run}",
    "$(touch PWNED)",
    [],
    [[[[[]]]]],
    [None, 1, "x", {}],
    {},
    {"x": {"y": {"z": [1]}}},
    {"a\nb": 1},
    {"": ""},
    {1: 2},
)


@contextmanager
def no_hang() -> Iterator[None]:
    """A block that takes longer than HANG_S is a failure."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still busy after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a mapping or a list."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inside:
        found.append((*path, key))
        if isinstance(part, dict | list):
            found += places(part, (*path, key))
    return found


# -- broken values: the file is YAML, and what it says is not allowed ------------------------------


def change_a_value(raw: dict[str, Any], rng: random.Random) -> tuple[Any, ...]:
    path = rng.choice(places(raw))
    parent(raw, path)[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return path


def lose_a_key(raw: dict[str, Any], rng: random.Random) -> tuple[Any, ...]:
    path = rng.choice([p for p in places(raw) if isinstance(p[-1], str)])
    del parent(raw, path)[path[-1]]
    return path


def misspell_a_key(raw: dict[str, Any], rng: random.Random) -> tuple[Any, ...]:
    path = rng.choice([p for p in places(raw) if isinstance(p[-1], str)])
    holder, old = parent(raw, path), path[-1]
    at = rng.randrange(len(old))
    letter = rng.choice([*string.ascii_letters, "\n", "\x07", "é", "\u202e", "{", "$", " ", "'"])
    holder[old[:at] + letter + old[at + 1 :]] = holder.pop(old)
    return path


def add_a_key(raw: dict[str, Any], rng: random.Random) -> tuple[Any, ...]:
    path = rng.choice([(), *(p for p in places(raw) if isinstance(at(raw, p), dict))])
    key = rng.choice(["seed", "x" * 5000, "a\nb", "\x00", "$(touch PWNED)", "{run}", "é", 7, True])
    at(raw, path)[key] = rng.choice(VALUES)
    return (*path, key)


def swap_two_values(raw: dict[str, Any], rng: random.Random) -> tuple[Any, ...]:
    """What is right at one place is wrong at the other."""
    one, other = rng.sample([p for p in places(raw) if len(p) > 1], 2)
    parent(raw, one)[one[-1]] = copy.deepcopy(at(raw, other))
    return one


def at(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        raw = raw[key]
    return raw


def parent(raw: Any, path: tuple[Any, ...]) -> Any:
    return at(raw, path[:-1])


# -- broken text: the file is no YAML, or more of it than there should be --------------------------


def cut_short(text: bytes, rng: random.Random) -> bytes:
    return text[: rng.randrange(len(text))]


def one_byte_changed(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]


def noise_inside(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    return text[:place] + rng.randbytes(rng.randrange(1, 200)) + text[place:]


def a_character_inside(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    characters = ["\t", "\x00", "\x1b", "\u2028", "\ufeff", "{", "[", "'", '"', ":", "*", "&", "!"]
    return text[:place] + rng.choice(characters).encode() + text[place:]


def a_line_twice(text: bytes, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def tabs(text: bytes, rng: random.Random) -> bytes:
    return text.replace(b"    ", b"\t", rng.randrange(1, 20))


def other_encodings(text: bytes, rng: random.Random) -> bytes:
    encoding = rng.choice(["utf-16", "utf-32", "utf-16-le", "cp500"])
    return text.decode().encode(encoding, "replace")


def nothing_much(_: bytes, rng: random.Random) -> bytes:
    contents = [b"", b"\n", b"#\n", b"---\n", b"- a\n", b"a", b"\xff", b"{}", b"[]", b"~", b"1e5"]
    return rng.choice(contents)


def deep(text: bytes, rng: random.Random) -> bytes:
    levels = rng.choice([30, 300, 3000, 30_000])
    opened, closed = rng.choice([("[", "]"), ("{a: ", "}"), ("[[", "")])
    return text + b"deep: " + opened.encode() * levels + closed.encode() * levels


def laughing(text: bytes, rng: random.Random) -> bytes:
    """Each line holds the one above it many times."""
    width, levels = rng.choice([(9, 9), (2, 40), (30, 12)])
    lines = [f"l0: &l0 [{'lol, ' * width}]"]
    lines += [f"l{n}: &l{n} [{f'*l{n - 1}, ' * width}]" for n in range(1, levels)]
    bomb = "\n".join(lines).encode()
    place = rng.choice([b"\ntasks:", b"\nmethods:", b"\nexperiments:"])
    first, _, rest = text.partition(place)
    top = f"*l{levels - 1}"
    keys = [f"results: {top}", f"scale: {top}", f"reference: {top}", f"extra: {top}"]
    return first + b"\n" + bomb + b"\n" + rng.choice(keys).encode() + place + rest


def endless(text: bytes, rng: random.Random) -> bytes:
    return text + rng.choice([b"loop: &a [*a]", b"loop: &a {b: *a}", b"? &a [*a]\n: 1"])


def tagged(text: bytes, rng: random.Random) -> bytes:
    values = [
        b"!!python/object/apply:os.system ['touch PWNED']",
        b"!!python/name:os.system",
        b"!!python/object/new:subprocess.Popen [['touch', 'PWNED']]",
        b"!!int x",
        b"!!bool x",
        b"!!timestamp x",
        b"!!binary x",
        b"2001-99-99",
        b"0x_",
        b"0x" + b"f" * 20_000,
        b"9" * 20_000,
        b"!unknown x",
        b"{<<: {a: 1}}",
        b"!!set {a, b}",
    ]
    key = rng.choice([b"results", b"scale", b"reference", b"other"])
    return re.sub(rb"(?m)^" + key + rb":.*\n", b"", text) + key + b": " + rng.choice(values)


def long(text: bytes, rng: random.Random) -> bytes:
    size = rng.choice([50_000, 10_000_000])
    addition = rng.choice([b"long: " + b"x" * size, b"x" * size, b"long: [" + b"1," * (size // 2)])
    return text + addition


VALUE_CHANGES: tuple[Callable[[dict[str, Any], random.Random], tuple[Any, ...]], ...] = (
    change_a_value,
    lose_a_key,
    misspell_a_key,
    add_a_key,
    swap_two_values,
)
TEXT_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    cut_short,
    one_byte_changed,
    noise_inside,
    a_character_inside,
    a_line_twice,
    tabs,
    other_encodings,
    nothing_much,
    deep,
    laughing,
    endless,
    tagged,
    long,
)


def broken(rng: random.Random) -> tuple[bytes, tuple[Any, ...]]:
    """A changed config.yaml, and the path of what was changed where it is still YAML."""
    if rng.random() < 0.5:
        raw = json.loads(RAW)
        path = rng.choice(VALUE_CHANGES)(raw, rng)
        return yaml.dump(raw, Dumper=NoAliases, allow_unicode=True).encode(), path
    return rng.choice(TEXT_CHANGES)(SHIPPED, rng), ()


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def refusal(file: Path) -> str | None:
    """The line with which a configuration is refused; None: it is planned at every scale."""
    with no_hang():
        try:
            for scale in SCALES:
                plan = graph.read({"scale": scale}, file)
                assert plan.contents
        except yaml_files.ConfigError as error:
            return str(error)
    return None


def assert_is_one_good_line(line: str, file: Path) -> None:
    assert line.isprintable(), repr(line)
    assert line.startswith(f"{file}: "), line
    said = line.removeprefix(f"{file}: ")
    assert len(said) <= LONGEST, said
    assert REMEDY.search(said), said


def test_any_broken_configuration_is_refused_in_one_line(tmp_path, monkeypatch, trials):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    rng = random.Random(0)
    for number in trials("configuration: fuzzed", 25, 500):
        line = None
        while line is None:  # some changes leave it valid, and then everything is planned
            content, path = broken(rng)
            file.write_bytes(content)
            line = refusal(file)
        assert_is_one_good_line(line, file)
        named = {str(key)[:20].encode("unicode_escape").decode() for key in path}
        at_line = re.search(r"line \d+", line)
        assert not path or at_line or any(n in line for n in named), (number, path, line)
    assert [f.name for f in tmp_path.iterdir()] == ["config.yaml"]


# -- as a person calls it --------------------------------------------------------------------------


def project(folder: Path) -> Path:
    """A folder with a config.yaml of its own, and the rest of the project."""
    for name in ("workflow", "tafs", "baselines", "claims.yaml", "environment.yml"):
        (folder / name).symlink_to(ROOT / name)
    return folder / "config.yaml"


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("snakemake")), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def own_lines(stderr: str) -> list[str]:
    """Standard error without Snakemake's announcement of its profile."""
    return [line for line in stderr.splitlines() if "workflow specific profile" not in line]


def test_a_broken_configuration_starts_nothing(tmp_path, trials):
    file = project(tmp_path)
    rng = random.Random(1)
    for number in trials("configuration: broken, as snakemake is called", 1, 25):
        line = None
        while line is None:
            content, _ = broken(rng)
            file.write_bytes(content)
            line = refusal(file)
        before = {f.name for f in tmp_path.iterdir()} | {".snakemake"}
        done = snakemake(tmp_path, "all", *(["--dry-run"] if number % 2 else []))
        assert done.returncode == 2
        assert done.stdout == ""
        [said] = own_lines(done.stderr)
        assert_is_one_good_line(said, Path("config.yaml"))
        assert {f.name for f in tmp_path.iterdir()} <= before


HOSTILE = (
    "",
    ".",
    "..",
    "../..",
    "/",
    "~/results",
    "-rf",
    "a{run}b",
    "{",
    "a'b",
    'a"b',
    "a`touch PWNED`b",
    "$(touch PWNED)",
    "a;touch PWNED",
    "a|b",
    "a\\b",
    "*",
    "a?b",
    "a[b]",
    "a#b",
    "a%20b",
    "a&b",
    "<a>",
    "\u202ea",
    "a\x00b".replace("\x00", "\x01"),
    "x" * 300,
    "a/" * 600 + "b",
    "7",
    "[1, 2]",
    "{a: 1}",
    "config.yaml",
    "config.yaml/results",
    "claims.yaml",
)


def test_a_path_that_a_shell_or_a_pattern_would_change_is_refused(tmp_path, trials):
    project(tmp_path).write_bytes(SHIPPED)
    for number in trials("configuration: hostile results=", 1, len(HOSTILE)):
        done = snakemake(tmp_path, "all", "--config", f"results={HOSTILE[number]}")
        assert done.returncode == 2
        [said] = own_lines(done.stderr)
        assert said.isprintable()
        assert said.startswith("config.yaml: results: ")
        assert REMEDY.search(said)
        assert not list(tmp_path.rglob("PWNED"))


def test_a_path_with_spaces_and_letters_of_any_script_is_planned(tmp_path):
    project(tmp_path).write_bytes(SHIPPED)
    given = ["--config", "scale=smoke", "results=./my results//שלום é+1/a,b=c@d"]
    done = snakemake(tmp_path, "all", "--dry-run", *given)
    assert done.returncode == 0, done.stderr
    assert "my results/שלום é+1/a,b=c@d/smoke/runs/" in done.stdout + done.stderr
