"""Stored prompt embeddings have the bits of those that are encoded, and spare the text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_pipelines
from support.checkpoints import EMBEDDED, PROMPTS, Checkpoint, embedded, our_images

from tafs.models import catalog, embeddings


@pytest.fixture(scope="module", params=[*EMBEDDED, "Flux2KleinPipeline"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    if request.param in EMBEDDED:
        return embedded(request.param)
    folder = tiny_pipelines.PIPELINES[request.param](tmp_path_factory.mktemp("tiny") / "checkpoint")
    return Checkpoint(catalog.backbones()[request.param], folder)


def encoders(backbone) -> list[str]:
    components = backbone.pipeline.components.items()
    return [name for name, c in components if name.startswith("text_encoder") and c is not None]


def test_the_second_model_encodes_nothing_and_has_the_same_bits(checkpoint, tmp_path):
    whole, folder = checkpoint.load(), tmp_path / "embeddings"
    first = checkpoint.load(embeddings=folder)
    assert encoders(first) == []
    expected = whole.encode(PROMPTS)
    found = first.encode(PROMPTS)
    assert encoders(first) == encoders(whole) != []
    second = checkpoint.load(embeddings=folder)
    for conditioning in (found, second.encode(PROMPTS)):
        assert torch.equal(conditioning.embeds, expected.embeds)
        assert torch.equal(conditioning.pooled, expected.pooled)
    assert torch.equal(our_images(second), our_images(whole))
    adapted = checkpoint.adapted()
    adapted.save_adapter(tmp_path / "adapter.safetensors")
    second.load_adapter(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(our_images(second), our_images(adapted))
    assert encoders(second) == []
    assert len(list(folder.iterdir())) == len(set(whole._with_negative(PROMPTS)))


def stored(tmp_path: Path, limit: int, monkeypatch) -> Path:
    monkeypatch.setattr(embeddings, "LIMIT", limit)
    embedded("shapes-flux").load(embeddings=tmp_path).encode(PROMPTS)
    return tmp_path


def test_a_damaged_file_is_one_line_and_is_written_again(tmp_path, monkeypatch, capsys):
    file, _ = stored(tmp_path, 1 << 20, monkeypatch).iterdir()
    content = file.read_bytes()
    for broken in (content[:-8], b"", content.replace(b"pooled", b"pooler")):
        file.write_bytes(broken)
        capsys.readouterr()
        embedded("shapes-flux").load(embeddings=tmp_path).encode(PROMPTS)
        line = f"{file}: is damaged; the prompt is encoded again\n"
        assert capsys.readouterr().out == line
        assert file.read_bytes() == content


def test_a_full_folder_takes_no_more_prompts(tmp_path, monkeypatch):
    sizes = [f.stat().st_size for f in stored(tmp_path / "all", 1 << 20, monkeypatch).iterdir()]
    assert len(sizes) == 2
    [file] = stored(tmp_path / "one", sum(sizes) * 3 // 4, monkeypatch).iterdir()
    assert file.stat().st_size in sizes
