"""Tenants on demand from one folder, which all replicas share: ``NAME.safetensors`` is there as soon as it is asked."""

from __future__ import annotations

import asyncio
import re
import stat
from pathlib import Path

from engines.http.refusals import RefusalError
from engines.serving.session import Session

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_BYTES = 1 << 30
SUFFIX = ".safetensors"


class TenantFolder:
    """Installs tenants of one session from files below one folder."""

    def __init__(self, session: Session, folder: Path | None) -> None:
        """Name the folder; None turns everything off."""
        self._session = session
        self._folder = None if folder is None else folder.resolve()
        self._loading = asyncio.Lock()

    async def find(self, name: str) -> bool:
        """Install the tenant of that name if the folder has it.

        Raises:
            RefusalError: its file is none that may be read.
            IaptError: its file does not fit the bundle.
        """
        if self._folder is None or not NAME.fullmatch(name):
            return False
        if not await asyncio.to_thread((self._folder / f"{name}{SUFFIX}").is_file):
            return False
        async with self._loading:
            if name not in self._session.tenants:
                await self.load(name, f"{name}{SUFFIX}", replace=False)
        return True

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Install a tenant.

        Args:
            name: what to call it.
            path: of its file, below the folder.
            replace: take the place of a tenant of that name.

        Raises:
            RefusalError: a name or a path that is not allowed, or no such file.
            IaptError: the file does not fit the bundle.
        """
        if not NAME.fullmatch(name):
            raise RefusalError(400, f"{name!r} is no name; expected letters, digits, . _ -", param="lora_name")
        file = await asyncio.to_thread(self._checked, path)
        await asyncio.to_thread(self._session.add_tenant, file, name, replace=replace)

    def _checked(self, path: str) -> Path:
        """The file, which stands below the folder and is no link out of it, no device, and not huge."""
        if self._folder is None:
            raise RefusalError(404, "this server has no folder of tenants", code="not_found")
        try:
            file = (self._folder / path).resolve(strict=True)
            status = file.stat()
        except (OSError, ValueError, RuntimeError) as error:
            raise RefusalError(404, f"there is no file {path!r}", param="lora_path", code="file_not_found") from error
        if not file.is_relative_to(self._folder):
            raise RefusalError(403, "the path leaves the folder of tenants", param="lora_path", code="path_not_allowed")
        if not stat.S_ISREG(status.st_mode) or file.suffix != SUFFIX or status.st_size > MAX_BYTES:
            raise RefusalError(
                400, f"expected a {SUFFIX} file of at most {MAX_BYTES} bytes", param="lora_path", code="invalid_file"
            )
        return file
