"""Pinning and downloading with the real client from a hub on 127.0.0.1, and their failures."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import hub
from support.downloads import (  # noqa: F401 - fixtures
    LARGE,
    PIPE,
    RESOURCES,
    ROOT,
    SD35,
    TOKEN,
    WEIGHTS,
    entry,
    fetched,
    fetched_once,
    got,
    locked,
    project,
    reset,
    served,
    write_yaml,
)

from tafs.assets import cache, lockfile
from tafs.assets.lockfile import LockedFile
from tafs.common import yaml_files

# ruff: noqa: F811 - tests take fixtures as arguments


def facts(data: bytes) -> LockedFile:
    return LockedFile(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_the_lock_file_pins_commits_sizes_and_sha256(locked):
    entries = lockfile.read_lock(locked.lock)
    assert list(entries) == sorted(RESOURCES)
    assert entries["pipe"].revision == hub.revision(locked.hub.folder / "owner/pipe")
    assert entries["pipe"].files == {name: facts(data) for name, data in PIPE.items()}
    assert entries["words"].type == "dataset"
    assert entries["words"].files == {"words.txt": facts(b"a cat\n")}
    assert entries["code"].revision == hub.revision(locked.hub.folder / "github/owner/code")
    assert entries["code"].files["data/train.txt"] == facts(b"a dog\n")


def test_the_patterns_of_pipelines_select_one_copy_of_the_weights(locked):
    files = lockfile.read_lock(locked.lock)["sd35-large"].files
    assert list(files) == [name for name, used in SD35.items() if used]


def test_a_resource_can_be_marked_as_random_and_unmarked(project):
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


def test_unavailable_resources_are_reported_and_not_pinned(project):
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


def test_pinned_revisions_change_only_on_request(project):
    text = project.lock.read_text()
    old = text.replace(lockfile.read_lock(project.lock)["words"].revision, "f" * 40)
    project.lock.write_text(old)
    project.succeed("lock")
    assert project.lock.read_text() == old
    project.succeed("lock", "words")
    assert project.lock.read_text() == text


def test_an_unknown_name_is_refused(project):
    said = project.failures("lock", "pope", code=2)["resources lock"]
    assert said == f"resources.yaml: has no 'pope' (available: {', '.join(sorted(RESOURCES))})"


def test_a_missing_connection_is_reported_in_one_line(project):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said = project.failures("lock", "pipe", "code", HF_ENDPOINT=url, TAFS_GITHUB=url)
    for name, page in (("pipe", f"{url}/owner/pipe"), ("code", f"{url}/raw/owner/code")):
        assert said[name].startswith(f"{page}: ConnectError")
        assert said[name].endswith("; check the connection and try again")


def test_fetched_files_are_found_offline(fetched):
    assert {p: (cache.path("pipe") / p).read_bytes() for p in PIPE} == PIPE
    assert (cache.path("words") / "words.txt").read_bytes() == b"a cat\n"
    assert (cache.path("code") / "data/test.txt").read_bytes() == b"a bird\n"
    assert (cache.path("closed") / "model.safetensors").read_bytes() == b"closed"
    assert cache.path("code") == fetched.home / "tafs/files" / lockfile.read_lock()["code"].revision
    assert fetched.hub.requests == []


def test_fetching_again_is_a_no_op(fetched):
    fetched.succeed("fetch")  # notes the times of the copied files
    stamps = {f: f.stat().st_mtime_ns for f in (fetched.home / "tafs/verified").iterdir()}
    out = fetched.succeed("fetch")
    assert out.count("verified in") == len(stamps) == len(RESOURCES)
    assert fetched.hub.requests == []
    assert all(file.stat().st_mtime_ns == time for file, time in stamps.items())


def test_a_token_opens_a_gated_repository_and_is_not_written_anywhere(project):
    url = project.hub.url
    gated = f"{url}/owner/closed is gated: set HF_TOKEN after accepting the licence there"
    assert project.failures("fetch", "closed") == {"closed": gated}
    assert project.failures("fetch", "closed", HF_TOKEN="hf_other") == {"closed": gated}
    refused = project.failures("fetch", "closed", HF_TOKEN="hf_expired")["closed"]
    assert "HTTP status 401; make a new HF_TOKEN" in refused and "hf_expired" not in refused
    with pytest.raises(
        ValueError, match="closed: not fetched; run `python -m tafs.assets.download fet"
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


def test_an_interrupted_fetch_continues_with_the_missing_files(project):
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
        rf"`python -m tafs\.assets\.download fetch {name}`",
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


def test_an_altered_file_is_refused_by_jobs_and_by_fetch(fetched):
    file = cache.path("pipe") / WEIGHTS
    times = file.stat()
    file.write_bytes(LARGE[:-1] + b"!")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # restores the modification time
    with pytest.raises(ValueError, match=rf"{file} is altered: has SHA-256 .*; delete .* and run"):
        cache.path("pipe")
    said = fetched.failures("fetch", "pipe")["pipe"]
    assert said.startswith(f"{file} is altered: has SHA-256") and fetched.hub.requests == []
    file.write_bytes(LARGE)
    assert cache.path("pipe") == file.parent.parent


def test_only_changed_files_are_hashed_again(fetched, monkeypatch):
    file = cache.path("pipe") / WEIGHTS
    hashed = []
    sha256 = cache.sha256
    monkeypatch.setattr(cache, "sha256", lambda f: hashed.append(f) or sha256(f))
    cache.path("pipe")
    assert hashed == []
    file.touch()
    for _ in range(2):
        cache.path("pipe")
    assert hashed == [file]


def test_truncated_and_missing_files_are_refused(fetched):
    file = cache.path("code") / "data/train.txt"
    file.write_bytes(b"a d")
    assert "train.txt is altered: has 3 bytes instead of 6" in fetched.failures("fetch")["code"]
    file.unlink()
    with pytest.raises(ValueError, match=rf"code: {file} is missing; run `python -m tafs.assets."):
        cache.path("code")


def test_a_removed_commit_is_reported(project):
    present = lockfile.read_lock()["pipe"].revision
    project.lock.write_text(project.lock.read_text().replace(present, "f" * 40))
    page = f"{project.hub.url}/owner/pipe"
    assert project.failures("fetch", "pipe") == {
        "pipe": f"{page}: the pinned revision no longer exists; lock it again"
    }


def test_a_full_disk_is_detected_before_the_download(project):
    content = yaml_files.load_yaml(project.lock, dict)
    content["pipe"]["files"][WEIGHTS]["size"] = 10**18
    write_yaml(project.lock, content)
    said = project.failures("fetch", "pipe")["pipe"]
    assert re.fullmatch(
        rf"needs 1000000000\.\d\d GB, but {project.folder} has only \d+\.\d\d GB free; make room "
        "or set HF_HOME to a folder on a larger disk",
        said,
    )
    assert project.hub.requests == []


def test_a_disk_that_fills_up_during_the_download_leaves_no_broken_file(project):
    said = project.failures("fetch", "pipe", limit=1_000_000)["pipe"]
    assert "make room or set HF_HOME to a folder on a larger disk" in said
    project.succeed("fetch", "pipe")
    assert (cache.path("pipe") / WEIGHTS).read_bytes() == LARGE


def test_offline_mode_is_reported(project):
    said = project.failures("fetch", "pipe", "code", HF_HUB_OFFLINE="1")
    assert said["pipe"].endswith("owner/pipe: HF_HUB_OFFLINE is set; unset it for this command")
    assert said["code"].endswith("owner/code: HF_HUB_OFFLINE is set; unset it for this command")


def test_a_missing_lock_file_or_entry_is_reported_with_the_command(project):
    other = Path("other.yaml")
    with pytest.raises(ValueError, match="other.yaml: not found; run `make lock`"):
        cache.path("pipe", other)
    shutil.copy(project.lock, other)
    command = "`python -m tafs.assets.download lock pope --lock other.yaml`"
    for ask in (cache.path, cache.digest, cache.is_random):
        with pytest.raises(ValueError) as caught:
            ask("pope", other)
        assert str(caught.value) == f"other.yaml: 'pope' is not pinned; run {command}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": []}, "pipe.files"),
        ({"hub": "pipe"}, "pipe.hub"),
        ({"github": "owner/pipe"}, "pipe: needs either 'hub' or 'github'"),
        ({"file": ["*"]}, "unknown key 'pipe.file'; did you mean 'files'"),
        ({"files": ["../x"]}, "pipe.files.0: is not a path inside a repository"),
        ({"gigabytes": 0}, "pipe.gigabytes"),
        ({"hub": None, "github": "owner/code"}, "pipe: files on GitHub are plain paths, not pat"),
    ],
)
def test_a_mistake_in_resources_yaml_is_reported_with_its_key(tmp_path, change, said):
    file = tmp_path / "resources.yaml"
    write_yaml(file, {"pipe": {**RESOURCES["pipe"], **change}})
    with pytest.raises(ValueError) as caught:
        lockfile.read(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert "\n" not in str(caught.value)


def test_a_lock_file_cannot_refer_outside_its_repository(project):
    content = yaml_files.load_yaml(project.lock, dict)
    content["code"]["files"]["../../secret"] = content["code"]["files"]["data/train.txt"]
    write_yaml(project.lock, content)
    with pytest.raises(ValueError, match="is not a path inside a repository"):
        cache.path("code")


def test_the_projects_own_resources_are_complete():
    entries = lockfile.read(ROOT / "resources.yaml")
    assert set(entries) == {
        *("flux-dev", "flux2-klein-base-4b", "sd35-medium", "sd35-large", "sd35-large-turbo"),
        *("flux-schnell", "flux-turbo-alpha", "hyper-flux", "sana-1.5", "sana-sprint"),
        *("hidream-full", "hidream-fast", "llama-3.1-8b-instruct"),
        *("pickscore", "clip-vit-h-14", "clip-vit-l-14", "hpsv2", "imagereward"),
        *("bert-base-uncased", "mask2former", "unifiedreward", "siglip", "pickapic"),
        *("unifiedreward-2", "qwen2-vl-7b", "qwen3-vl-8b", "hpsv3", "geneval2"),
    }
    pickled = {f for e in entries.values() for f in e.files if f.endswith((".pt", ".bin"))}
    assert pickled == {"HPS_v2.1_compressed.pt", "ImageReward.pt"}  # there are no others of these


def test_downloads_import_no_model_libraries():
    code = "import sys, tafs.assets.download; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "diffusers"} & set(json.loads(done.stdout))


def test_a_command_can_use_a_folder_as_the_hub(project):
    script = str(ROOT / "tests" / "support" / "hub.py")
    command = [sys.executable, script, str(project.hub.folder), "--", sys.executable, "-m"]
    command += ["tafs.assets.download", "lock", "words", "--lock", "rehearsal.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HOME"}
    options = {"cwd": project.folder, "capture_output": True, "text": True, "check": False}
    refused = subprocess.run(command, env=environment, **options)
    assert refused.returncode == 2 and refused.stderr.startswith("HF_HOME: set it to a folder")
    done = subprocess.run(command, env={**environment, "HF_HOME": str(project.home)}, **options)
    assert done.returncode == 0, done.stderr
    both = lockfile.read_lock(Path("rehearsal.yaml"))["words"], lockfile.read_lock()["words"]
    assert both[0] == both[1]
