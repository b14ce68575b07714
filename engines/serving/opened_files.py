"""Whether a bundle's files are still those that were checked when it was opened."""

from __future__ import annotations

from pathlib import Path

from iapt_export.contract.disk import stamp_of
from iapt_export.contract.errors import BundleError
from iapt_export.contract.manifest import MANIFEST_FILE, BundleManifest


class OpenedFiles:
    """The files of a bundle, known by size and time: graphs and tokenizer are read later than hashes are checked."""

    def __init__(self, bundle: Path, manifest: BundleManifest) -> None:
        """Look at the files now."""
        self._bundle = bundle
        self._seen = {name: _seen(bundle / name) for name in (MANIFEST_FILE, *manifest.files)}

    def check(self) -> None:
        """Refuse to read on where another bundle stands in the place of the one that was opened.

        Raises:
            BundleError: a file is gone or another one; the first of them is named.
        """
        changed = (name for name, seen in self._seen.items() if _seen(self._bundle / name) != seen)
        if name := next(changed, None):
            raise BundleError(f"{self._bundle} was changed after it was opened ({name}, at least); open it again")


def _seen(path: Path) -> tuple[int, int] | None:
    """Size and time; not the inode's number, which some network file systems give anew."""
    stamp = stamp_of(path)
    return None if stamp is None else stamp[1:]
