"""Locking, fetching and every way they fail, by the real client against a hub on 127.0.0.1."""

import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from support import hub
from support.hub import Faults, Hub

from tafs.assets import cache, download, lockfile
from tafs.assets.lockfile import LockedFile

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TOKEN = "hf_accepted"
# More than the 10 MiB that the client writes at once, so that it has something to resume from.
LARGE = hashlib.shake_256(b"weights").digest(11_000_000)
PIPE = {
    "model_index.json": b'{"_class_name": "FluxPipeline"}\n',
    "transformer/config.json": b"{}\n",
    WEIGHTS: LARGE,
}
# Beside what the real repository holds for diffusers: other copies of the same weights.
SD35 = {
    "model_index.json": True,
    "sd3.5_large.safetensors": False,
    "scheduler/scheduler_config.json": True,
    "text_encoder/config.json": True,
    "text_encoder/model.fp16.safetensors": False,
    "text_encoder/model.safetensors": True,
    "text_encoder_2/config.json": True,
    "text_encoder_2/model.fp16.safetensors": False,
    "text_encoder_2/model.safetensors": True,
    "text_encoder_3/config.json": True,
    "text_encoder_3/model-00001-of-00002.safetensors": True,
    "text_encoder_3/model-00002-of-00002.safetensors": True,
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": False,
    "text_encoder_3/model.fp16-00002-of-00002.safetensors": False,
    "text_encoder_3/model.safetensors.index.json": True,
    "text_encoders/t5xxl_fp16.safetensors": False,
    "tokenizer/merges.txt": True,
    "tokenizer/special_tokens_map.json": True,
    "tokenizer/tokenizer_config.json": True,
    "tokenizer/vocab.json": True,
    "tokenizer_3/spiece.model": True,
    "tokenizer_3/tokenizer.json": True,
    "transformer/config.json": True,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": True,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True,
}
REPOSITORIES = {
    "owner/pipe": {**PIPE, "flux1-dev.safetensors": b"the same in one file"},
    "owner/closed": {"config.json": b"{}", "model.safetensors": b"closed"},
    "datasets/owner/words": {"words.txt": b"a cat\n", "labels.txt": b"cat\n"},
    "github/owner/code": {"data/train.txt": b"a dog\n", "data/test.txt": b"a bird\n"},
    "stabilityai/stable-diffusion-3.5-large": {name: name.encode() for name in SD35},
}


def entry(files: list[str], **where: str) -> dict[str, object]:
    facts = {"licence": "MIT", "gated": False, "gigabytes": 0.01, "used_for": "tests"}
    return {**where, "files": files, **facts}


RESOURCES = {
    "pipe": entry([*list(PIPE)[:2], "transformer/*model[.-][0s]*"], hub="owner/pipe"),
    "closed": entry(["*"], hub="owner/closed"),
    "words": entry(["words.txt"], hub="owner/words", type="dataset"),
    "code": entry(["data/train.txt", "data/test.txt"], github="owner/code"),
    "sd35-large": lockfile.read(ROOT / "resources.yaml")["sd35-large"].model_dump(
        mode="json", exclude_none=True
    ),
}


@dataclass
class Project:
    """A working folder with its two files and a Hugging Face cache."""

    folder: Path
    home: Path
    hub: Hub

    @property
    def lock(self) -> Path:
        return self.folder / "resources.lock.yaml"

    def run(self, *arguments: str, limit: int | None = None, **environment: str):
        """The command, with files of at most `limit` bytes."""
        done = subprocess.run(
            [sys.executable, "-m", "tafs.assets.download", *arguments],
            cwd=self.folder,
            env=self.hub.environment(**{"HF_HOME": str(self.home), **environment}),
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    def failures(self, *arguments: str, code: int = 1, **options) -> dict[str, str]:
        """What the command says of each resource while it exits with `code`."""
        done = self.run(*arguments, **options)
        assert done.returncode == code, done.stderr
        said = (line.partition(": ") for line in done.stderr.splitlines())
        known = {*RESOURCES, "gone", "typo", "nowhere", "busy", f"resources {arguments[0]}"}
        return {name: text for name, _, text in said if name in known}

    def succeed(self, *arguments: str, **options) -> str:
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout


def write_yaml(file: Path, content: object) -> None:
    file.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The hub."""
    folder = tmp_path_factory.mktemp("hub")
    for repository, files in REPOSITORIES.items():
        for name, data in files.items():
            file = folder / repository / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    with Hub(folder) as running:
        reset(running)
        yield running


def reset(running: Hub) -> None:
    running.faults = Faults(
        gated={"owner/closed"}, accepted_tokens={TOKEN}, known_tokens={"hf_other"}
    )
    running.requests.clear()


@pytest.fixture(scope="module")
def locked(served, tmp_path_factory) -> Project:
    """Everything locked."""
    folder = tmp_path_factory.mktemp("locked")
    project = Project(folder, folder / "home", served)
    write_yaml(folder / "resources.yaml", RESOURCES)
    project.succeed("lock", HF_TOKEN=TOKEN)
    return project


@pytest.fixture
def project(locked, tmp_path, monkeypatch) -> Project:
    """Everything locked, nothing fetched; this process uses the same cache and folder."""
    for file in ("resources.yaml", "resources.lock.yaml"):
        shutil.copy(locked.folder / file, tmp_path)
    reset(locked.hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return Project(tmp_path, tmp_path / "home", locked.hub)


@pytest.fixture(scope="module")
def fetched_once(locked) -> Project:
    """Everything fetched, into a cache that tests copy."""
    folder = locked.folder / "fetched"
    folder.mkdir()
    shutil.copy(locked.lock, folder)
    project = Project(folder, folder / "home", locked.hub)
    reset(locked.hub)
    project.succeed("fetch", HF_TOKEN=TOKEN)
    return project


@pytest.fixture
def fetched(project, fetched_once) -> Project:
    shutil.copytree(fetched_once.home, project.home, symlinks=True)
    return project


def got(running: Hub) -> set[str]:
    """The files that were downloaded since the hub's last reset."""
    found = (re.search(r"/resolve/\w+/(.+)", r.path) for r in running.requests if r.method == "GET")
    return {match[1] for match in found if match}


# -- locking ---------------------------------------------------------------------------------------


def facts(data: bytes) -> LockedFile:
    return LockedFile(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_lock_holds_commits_sizes_and_sha256(locked):
    entries = lockfile.read_lock(locked.lock)
    assert list(entries) == sorted(RESOURCES)
    assert entries["pipe"].revision == hub.revision(locked.hub.folder / "owner/pipe")
    assert entries["pipe"].files == {name: facts(data) for name, data in PIPE.items()}
    assert entries["words"].type == "dataset"
    assert entries["words"].files == {"words.txt": facts(b"a cat\n")}
    assert entries["code"].revision == hub.revision(locked.hub.folder / "github/owner/code")
    assert entries["code"].files["data/train.txt"] == facts(b"a dog\n")


def test_the_patterns_of_pipelines_take_one_copy_of_the_weights(locked):
    files = lockfile.read_lock(locked.lock)["sd35-large"].files
    assert list(files) == [name for name, used in SD35.items() if used]


def test_one_resource_is_locked_again_marked_as_random_and_back(project):
    before, text = lockfile.read_lock(project.lock), project.lock.read_text()
    known = cache.digest("pipe")
    project.succeed("lock", "pipe", "--random-weights")
    after = lockfile.read_lock(project.lock)
    assert after.pop("pipe") == before.pop("pipe").model_copy(update={"weights": "random"})
    assert after == before
    assert cache.is_random("pipe") and not cache.is_random("code")
    assert cache.digest("pipe") != known
    project.succeed("lock", "pipe")
    assert project.lock.read_text() == text
    assert cache.digest("pipe") == known


def test_what_cannot_be_locked_is_said_and_stays_out(project):
    more = {
        "gone": entry(["*"], hub="owner/none"),
        "typo": entry(["*.onnx"], hub="owner/pipe"),
        "nowhere": entry(["a.txt"], github="owner/none"),
        "busy": entry(["*"], hub="owner/busy"),
    }
    (project.hub.folder / "owner/busy").mkdir(exist_ok=True)
    project.hub.faults.busy = {"owner/busy"}
    write_yaml(project.folder / "resources.yaml", {**RESOURCES, **more})
    before = lockfile.read_lock(project.lock)
    project.lock.write_text(project.lock.read_text().replace(before["words"].revision, "f" * 40))
    url = project.hub.url
    assert project.failures("lock", "--update") == {
        "closed": f"{url}/owner/closed is gated: set HF_TOKEN after accepting the licence there",
        "gone": f"{url}/owner/none: not found, or private; correct it in resources.yaml or set "
        "HF_TOKEN",
        "typo": "no file matches '*.onnx'; correct `files` in resources.yaml (there are: "
        f"flux1-dev.safetensors, {', '.join(PIPE)})",
        "nowhere": f"{url}/api/v3/repos/owner/none/commits/HEAD: HTTP status 404; correct it in "
        "resources.yaml or lock it again",
        "busy": f"{url}/api/models/owner/busy: HTTP status 503; try again later",
    }
    assert lockfile.read_lock(project.lock) == before


def test_what_is_pinned_stays_so_until_an_update_is_asked_for(project):
    text = project.lock.read_text()
    old = text.replace(lockfile.read_lock(project.lock)["words"].revision, "f" * 40)
    project.lock.write_text(old)
    project.succeed("lock")
    assert project.lock.read_text() == old
    project.succeed("lock", "words")
    assert project.lock.read_text() == text


def test_a_name_that_is_not_in_the_file_is_refused(project):
    said = project.failures("lock", "pope", code=2)["resources lock"]
    assert said == f"resources.yaml: has no 'pope' (available: {', '.join(sorted(RESOURCES))})"


def test_without_a_connection_one_line_says_so(project):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said = project.failures("lock", "pipe", "code", HF_ENDPOINT=url, TAFS_GITHUB=url)
    for name, page in (("pipe", f"{url}/owner/pipe"), ("code", f"{url}/raw/owner/code")):
        assert said[name].startswith(f"{page}: ConnectError")
        assert said[name].endswith("; check the connection and try again")


# -- fetching --------------------------------------------------------------------------------------


def test_fetched_files_are_found_without_a_network(fetched):
    assert {p: (cache.path("pipe") / p).read_bytes() for p in PIPE} == PIPE
    assert (cache.path("words") / "words.txt").read_bytes() == b"a cat\n"
    assert (cache.path("code") / "data/test.txt").read_bytes() == b"a bird\n"
    assert (cache.path("closed") / "model.safetensors").read_bytes() == b"closed"
    assert cache.path("code") == fetched.home / "tafs/files" / lockfile.read_lock()["code"].revision
    assert fetched.hub.requests == []


def test_nothing_is_fetched_twice(fetched):
    fetched.succeed("fetch")  # notes the copied files' times
    stamps = {f: f.stat().st_mtime_ns for f in (fetched.home / "tafs/verified").iterdir()}
    out = fetched.succeed("fetch")
    assert out.count("verified in") == len(stamps) == len(RESOURCES)
    assert fetched.hub.requests == []
    assert all(file.stat().st_mtime_ns == time for file, time in stamps.items())


def test_a_token_opens_a_gate_and_stays_secret(project):
    url = project.hub.url
    gated = f"{url}/owner/closed is gated: set HF_TOKEN after accepting the licence there"
    assert project.failures("fetch", "closed") == {"closed": gated}
    assert project.failures("fetch", "closed", HF_TOKEN="hf_other") == {"closed": gated}
    refused = project.failures("fetch", "closed", HF_TOKEN="hf_expired")["closed"]
    assert "HTTP status 401; make a new HF_TOKEN" in refused and "hf_expired" not in refused
    with pytest.raises(
        ValueError, match="closed: not fetched; run `python -m tafs.assets.download fetc"
    ):
        cache.path("closed")
    project.succeed("fetch", "closed", HF_TOKEN=TOKEN)
    assert (cache.path("closed") / "model.safetensors").read_bytes() == b"closed"
    written = [file for file in project.folder.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_an_interrupted_download_resumes(project):
    project.hub.faults.truncate_once = {WEIGHTS: 10_600_000}
    project.succeed("fetch", "pipe")
    assert f"bytes={10 * 2**20}-" in {request.range for request in project.hub.requests}
    assert (cache.path("pipe") / WEIGHTS).read_bytes() == LARGE


def test_an_interrupted_fetch_continues_with_what_is_missing(project):
    project.hub.faults.absent = {WEIGHTS}
    said = project.failures("fetch", "pipe")["pipe"]
    assert said.startswith(project.hub.url) and WEIGHTS in said
    assert said.endswith("HTTP status 404; correct it in resources.yaml or lock it again")
    reset(project.hub)
    project.succeed("fetch", "pipe")
    assert got(project.hub) == {WEIGHTS}


@pytest.mark.parametrize("name", ["pipe", "code"])
def test_a_changed_byte_is_refused_until_the_file_is_deleted(project, name):
    changed = {"pipe": "model_index.json", "code": "data/train.txt"}[name]
    project.hub.faults.changed = {changed}
    said = project.failures("fetch", name)[name]
    found = re.fullmatch(
        r"(\S+) is altered: has SHA-256 \w{64} instead of (\w{64}); delete (\S+) and run "
        rf"`python -m tafs\.resources fetch {name}`",
        said,
    )
    assert found and found[1].endswith(changed)
    assert found[2] == lockfile.read_lock()[name].files[changed].sha256
    with pytest.raises(ValueError, match="not fetched"):
        cache.path(name)
    Path(found[3]).unlink()
    reset(project.hub)
    project.succeed("fetch", name)
    assert cache.path(name).is_dir()


def test_an_altered_file_is_noticed_by_jobs_and_refused_by_name(fetched):
    file = cache.path("pipe") / WEIGHTS
    times = file.stat()
    file.write_bytes(LARGE[:-1] + b"!")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been written
    with pytest.raises(ValueError, match=rf"{file} is altered: has SHA-256 .*; delete .* and run"):
        cache.path("pipe")
    said = fetched.failures("fetch", "pipe")["pipe"]
    assert said.startswith(f"{file} is altered: has SHA-256") and fetched.hub.requests == []
    file.write_bytes(LARGE)
    assert cache.path("pipe") == file.parent.parent


def test_a_file_is_hashed_again_only_where_it_has_changed(fetched, monkeypatch):
    file = cache.path("pipe") / WEIGHTS
    hashed = []
    sha256 = download.sha256
    monkeypatch.setattr(download, "sha256", lambda f: hashed.append(f) or sha256(f))
    cache.path("pipe")
    assert hashed == []
    file.touch()
    for _ in range(2):
        cache.path("pipe")
    assert hashed == [file]


def test_a_shortened_file_is_refused_by_its_size(fetched):
    (cache.path("code") / "data/train.txt").write_bytes(b"a d")
    assert "train.txt is altered: has 3 bytes instead of 6" in fetched.failures("fetch")["code"]


def test_a_missing_file_is_noticed(fetched):
    file = cache.path("code") / "data/train.txt"
    file.unlink()
    with pytest.raises(ValueError, match=rf"code: {file} is missing; run `python -m tafs.resource"):
        cache.path("code")


def test_a_commit_that_is_gone_is_said(project):
    present = lockfile.read_lock()["pipe"].revision
    project.lock.write_text(project.lock.read_text().replace(present, "f" * 40))
    page = f"{project.hub.url}/owner/pipe"
    assert project.failures("fetch", "pipe") == {
        "pipe": f"{page}: no longer has the locked revision; lock it again"
    }


def test_a_full_disk_is_noticed_before_the_download(project):
    content = yaml.safe_load(project.lock.read_text())
    content["pipe"]["files"][WEIGHTS]["size"] = 10**18
    write_yaml(project.lock, content)
    said = project.failures("fetch", "pipe")["pipe"]
    assert re.fullmatch(
        rf"needs 1000000000\.\d\d GB, but {project.folder} has only \d+\.\d\d GB free; make room "
        "or set HF_HOME to a folder on a larger disk",
        said,
    )
    assert project.hub.requests == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_broken(project):
    said = project.failures("fetch", "pipe", limit=1_000_000)["pipe"]
    assert "make room or set HF_HOME to a folder on a larger disk" in said
    project.succeed("fetch", "pipe")
    assert (cache.path("pipe") / WEIGHTS).read_bytes() == LARGE


def test_offline_mode_is_named(project):
    said = project.failures("fetch", "pipe", "code", HF_HUB_OFFLINE="1")
    assert said["pipe"].endswith("owner/pipe: HF_HUB_OFFLINE is set; unset it for this command")
    assert said["code"].endswith("owner/code: HF_HUB_OFFLINE is set; unset it for this command")


# -- what is written down --------------------------------------------------------------------------


def test_a_missing_lock_or_entry_names_the_command(project):
    other = Path("other.yaml")
    with pytest.raises(ValueError, match="other.yaml: no such lock file; run `make lock`"):
        cache.path("pipe", other)
    shutil.copy(project.lock, other)
    command = "`python -m tafs.assets.download lock pope --lock other.yaml`"
    for ask in (cache.path, cache.digest, cache.is_random):
        with pytest.raises(ValueError) as caught:
            ask("pope", other)
        assert str(caught.value) == f"other.yaml: has no 'pope'; run {command}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": []}, "pipe.files"),
        ({"hub": "pipe"}, "pipe.hub"),
        ({"github": "owner/pipe"}, "pipe: needs either 'hub' or 'github'"),
        ({"file": ["*"]}, "unknown key 'pipe.file'; did you mean 'files'"),
        ({"files": ["../x"]}, "pipe.files.0: is no path inside a repository"),
        ({"files": ["/etc/passwd"]}, "pipe.files.0: is no path inside a repository"),
        ({"gigabytes": 0}, "pipe.gigabytes"),
    ],
)
def test_a_mistake_in_resources_yaml_is_named(tmp_path, change, said):
    file = tmp_path / "resources.yaml"
    write_yaml(file, {"pipe": {**RESOURCES["pipe"], **change}})
    with pytest.raises(ValueError) as caught:
        lockfile.read(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert "\n" not in str(caught.value)


def test_patterns_cannot_be_resolved_on_github(tmp_path):
    file = tmp_path / "resources.yaml"
    write_yaml(file, {"code": entry(["data/*.txt"], github="owner/code")})
    with pytest.raises(ValueError, match="files on GitHub are plain paths, not patterns"):
        lockfile.read(file)


def test_a_lock_cannot_point_out_of_its_repository(project):
    content = yaml.safe_load(project.lock.read_text())
    content["code"]["files"]["../../secret"] = content["code"]["files"]["data/train.txt"]
    write_yaml(project.lock, content)
    with pytest.raises(ValueError, match="is no path inside a repository"):
        cache.path("code")


def test_the_projects_own_resources_are_complete():
    entries = lockfile.read(ROOT / "resources.yaml")
    assert set(entries) == {
        *("flux-dev", "sd35-medium", "sd35-large", "sd35-large-turbo", "flux-schnell"),
        *("flux-turbo-alpha", "hyper-flux", "sana-1.5", "sana-sprint"),
        *("hidream-full", "hidream-fast", "llama-3.1-8b-instruct"),
        *("pickscore", "clip-vit-h-14", "clip-vit-l-14", "hpsv2", "imagereward"),
        *("bert-base-uncased", "mask2former", "unifiedreward", "siglip", "pickapic"),
    }
    pickled = {f for e in entries.values() for f in e.files if f.endswith((".pt", ".bin"))}
    assert pickled == {"HPS_v2.1_compressed.pt", "ImageReward.pt"}  # there are no others of these


def test_jobs_import_nothing_heavy():
    code = "import sys, tafs.assets.download; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "huggingface_hub"} & set(json.loads(done.stdout))


def test_a_command_runs_against_a_folder_of_repositories(project):
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "hub.py"),
        str(project.hub.folder),
        "--",
    ]
    command += [
        sys.executable,
        "-m",
        "tafs.assets.download",
        "lock",
        "words",
        "--lock",
        "rehearsal.yaml",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HOME"}
    refused = subprocess.run(
        command, env=environment, cwd=project.folder, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and refused.stderr.startswith("HF_HOME: set it to a folder")
    done = subprocess.run(
        command,
        env={**environment, "HF_HOME": str(project.home)},
        cwd=project.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    both = lockfile.read_lock(Path("rehearsal.yaml"))["words"], lockfile.read_lock()["words"]
    assert both[0] == both[1]
