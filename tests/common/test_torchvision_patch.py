"""torchvision is patched before the packages that import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tafs.common import torchvision_patch

ROOT = Path(__file__).resolve().parents[2]
IMPORT_TORCHVISION = {"diffusers", "transformers", "peft", "open_clip", "timm", "torchvision"}
SOURCES = sorted((ROOT / "tafs").rglob("*.py"))


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return set()


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one, without what only type checkers read."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield child
        yield from executed(child)


def test_every_module_patches_torchvision_before_it_imports_a_package_that_needs_it() -> None:
    late = []
    for file in SOURCES:
        patched = False
        nodes = [n for n in executed(ast.parse(file.read_text())) if imported(n)]
        for node in sorted(nodes, key=lambda node: node.lineno):  # type: ignore[attr-defined]
            patched |= "tafs.common.torchvision_patch" in imported(node)
            needs = {name.partition(".")[0] for name in imported(node)} & IMPORT_TORCHVISION
            if needs and not patched:
                late.append(f"{file.relative_to(ROOT)}:{node.lineno}: {sorted(needs)}")  # type: ignore[attr-defined]
    assert late == []


def test_torchvision_cannot_be_imported_beside_a_cpu_torch_unless_patched() -> None:
    import torchvision

    missing = torch.version.cuda is None and not torchvision.extension._has_ops()
    assert bool(torchvision_patch._schemas) == missing
    assert torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4]).shape == (3, 4, 4)
    if not missing:
        pytest.skip("this torchvision was built for this torch")
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    assert b"operator torchvision::nms does not exist" in done.stderr


def test_torchvision_is_not_patched_twice_or_where_torch_has_cuda(monkeypatch) -> None:
    before = list(torchvision_patch._schemas)
    torchvision_patch.patch_torchvision()
    assert torchvision_patch._schemas == before
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torchvision_patch, "_load_extension", lambda: pytest.fail("looked for it"))
    torchvision_patch.patch_torchvision()


def test_a_pipeline_is_imported_without_warnings_of_torchao() -> None:
    code = "import tafs.common.torchvision_patch; from diffusers import FluxPipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr and "pytree" not in done.stderr
