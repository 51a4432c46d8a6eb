"""No file of a whole run contains a credential from its environment.

The results are under a path with a space and letters of several scripts, which every stage must
support.
"""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet
import pytest
from PIL import Image
from support.project_copy import NEEDED

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_Canary+One/Xq7!wZ2k9",
    "WANDB_API_KEY": "wandbcanary0123456789abcdef01",
    "MLFLOW_TRACKING_PASSWORD": "mlflow canary p&ss=w0rd",
    "AWS_SECRET_ACCESS_KEY": "aws/Canary+Key%Secret/Yv83m",
}
RUN_S = 3000


@pytest.fixture(scope="module")
def left_behind(request, tmp_path_factory) -> list[Path]:
    """Return all files of a run of everything, its report and its tracking."""
    if not request.config.getoption("--torture"):
        pytest.skip("a run of everything takes minutes")
    folder = tmp_path_factory.mktemp("secrets")
    for name in NEEDED:
        (folder / name).symlink_to(ROOT / name)
    given = ["--config", "scale=smoke", "results=my results/été שלום"]
    for arguments in (["all"], ["--report", "report.zip"]):
        done = subprocess.run(
            [str(Path(sys.executable).with_name("snakemake")), *arguments, *given],
            cwd=folder,
            env={
                **os.environ,
                **SECRETS,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            check=False,
            timeout=RUN_S,
        )
        assert done.returncode == 0, done.stderr.decode()
        (folder / f"said{arguments[0]}.txt").write_bytes(done.stdout + done.stderr)
    return [file for file in folder.rglob("*") if file.is_file() and ROOT not in file.parents]


def forms(secret: str) -> Iterator[bytes]:
    """Yield the forms in which a secret may have been written."""
    plain = secret.encode()
    yield plain
    yield quote(secret, safe="").encode()
    for shift in range(3):  # depends on its position in the encoded data
        encoded = base64.b64encode(b"\0" * shift + plain)
        # The first and last characters depend on the neighbouring data.
        whole = encoded[-(-shift * 8 // 6) + (1 if shift else 0) : -4]
        yield whole
        yield whole.replace(b"+", b"-").replace(b"/", b"_")


def contents(file: Path) -> Iterator[bytes]:
    """Yield a file's bytes and what is compressed or encoded in it."""
    data = file.read_bytes()
    yield data
    if data.startswith(b"PAR1"):
        table = pyarrow.parquet.read_table(file)
        yield str(table.schema.metadata).encode()
        yield table.to_pandas().to_csv().encode()
    elif data.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    elif data.startswith(b"%PDF"):
        for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, flags=re.DOTALL):
            yield zlib.decompressobj().decompress(stream)
    elif data.startswith(b"\x89PNG"):
        yield str(Image.open(io.BytesIO(data)).info).encode()
    elif file.suffix == ".html":
        for encoded in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
            yield base64.b64decode(encoded + b"==")


def traces(secret: str, files: list[Path]) -> list[Path]:
    wanted = list(forms(secret))
    return [f for f in files if any(form in part for part in contents(f) for form in wanted)]


def test_no_file_contains_a_credential(left_behind, trials):
    kinds = {file.suffix for file in left_behind}
    assert {".db", ".html", ".json", ".jsonl", ".log", ".parquet", ".pdf", ".png"} <= kinds
    secrets = list(SECRETS.values())
    for number in trials("secrets: in the environment of a whole run", 0, len(secrets)):
        assert traces(secrets[number], left_behind) == []


@pytest.mark.parametrize("name", SECRETS)
def test_a_credential_is_found_in_any_form(tmp_path, name):
    secret, file = SECRETS[name], tmp_path / "a.log"
    plain = secret.encode()
    written = [plain, quote(secret, safe="").encode()]
    written += [base64.b64encode(b"x" * n + plain + b"yz") for n in range(6)]
    written += [base64.urlsafe_b64encode(b"x" * n + plain) for n in range(6)]
    for content in written:
        file.write_bytes(b"before " + content + b" after")
        assert traces(secret, [file]) == [file], content
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", plain * 9)
    assert traces(secret, [file]) == [file]
