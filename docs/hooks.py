"""Hooks of the site (mkdocs.yml): links to files of the project lead somewhere there too.

Guides link to files as a code host shows them. A linked file outside docs/ becomes a page or a
file of the site below project/, and a folder a page that lists its files. The notebook becomes a
page. A link that leads nowhere stays as it is, and the site's strict build refuses it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r'(\]\(|src=")([^)\s#"]+)')
CODE = {".py": "python", ".yaml": "yaml", ".jsonl": "json", "": "text"}  # shown on a page
PLACES: dict[str, Path] = {}  # of the pages whose links are followed, by their place in the site


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what the added pages link to."""
    docs = Path(config.docs_dir)
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        _add(files, config, docs / notebook.src_uri)
    PLACES.update({f.src_uri: docs / f.src_uri for f in files.documentation_pages()})
    PLACES.update({_uri(f, config): f for f in docs.glob("*.ipynb")})
    todo = list(PLACES.values())
    while todo:
        for path in _links(todo.pop()):
            if files.get_file_from_path(_uri(path, config)) is None:
                _add(files, config, path)
                if path.suffix == ".md" or path.is_dir():
                    PLACES[_uri(path, config)] = path
                    todo.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the links of a page lead to where their files are in the site."""
    place = PLACES.get(page.file.src_uri)
    if place is None:
        return markdown
    folder, here = _folder(place), os.path.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / found[2]))
        if "://" in found[2] or not path.exists():
            return found[0]
        return found[1] + os.path.relpath(_uri(_shown(path), config), here or ".")

    return LINK.sub(moved, markdown)


def _shown(path: Path) -> Path:
    """The README of a folder that has one."""
    readme = path / "README.md"
    return readme if readme.is_file() else path


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _links(place: Path) -> list[Path]:
    """The existing files and folders that a page links to."""
    targets = [found[2] for found in LINK.finditer(_markdown(place))]
    paths = [Path(os.path.normpath(_folder(place) / t)) for t in targets if "://" not in t]
    return [_shown(path) for path in paths if path.exists()]


def _uri(path: Path, config: Any) -> str:
    """The place of a file of the project in the site's sources."""
    docs = Path(config.docs_dir)
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix().replace(".ipynb", ".md")
    name = f"project/{path.relative_to(docs.parent).as_posix()}"
    if path.is_dir():
        return f"{name}/index.md"
    return f"{name}.md" if path.suffix in CODE else name


def _add(files: Files, config: Any, path: Path) -> None:
    uri = _uri(path, config)
    if uri.endswith(".md"):
        files.append(File.generated(config, uri, content=_markdown(path)))
    else:
        files.append(File.generated(config, uri, abs_src_path=str(path)))


def _markdown(path: Path) -> str:
    """A file as a page."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith(("_", ".")))
        return f"# {path.name}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{t}\n```" if k == "code" else t for t, k in cells)
    if path.suffix in CODE:
        return f"# {path.name}\n\n````{CODE[path.suffix]}\n{text}\n````\n"
    return text
