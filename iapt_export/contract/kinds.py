"""What stands at a path where another kind of folder was expected, for errors. Standard library only."""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "manifest.json": "a bundle",
    "adapter_config.json": "an adapter, which --adapter of 'iapt-export build' takes",
    "config.json": "a model, which --model takes",
}
"""The file by which a folder is known, and what it is then; the first counts, as bundles have a model's files too."""


def found_at(path: Path) -> str:
    """The end of a sentence such as "expected a bundle, found ..."."""
    for name, kind in KINDS.items():
        if (path / name).is_file():
            return kind
    if path.is_dir():
        return "a folder that is nothing of ours"
    if not path.exists():
        return "nothing there"
    for name, kind in KINDS.items():
        if (path.parent / name).is_file():
            return f"a file of {kind.partition(',')[0]}; name the folder, {path.parent}"
    return "a file"
