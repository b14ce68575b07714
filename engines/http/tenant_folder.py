"""Tenants on demand from one folder, which all replicas share: ``NAME.safetensors`` is there as soon as it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from engines.http.refusals import RefusalError, refusal_of
from engines.serving.session import Session
from engines.serving.tenants import TenantsFullError
from iapt_export.contract.disk import Stamp, stamp_of
from iapt_export.contract.errors import IaptError
from iapt_export.contract.tenant_card import NAME

MAX_BYTES = 1 << 30
SUFFIX = ".safetensors"
TENANTS_FULL = "tenants_full"
"""The code of a refusal for want of a place."""

_log = logging.getLogger(__name__)


class TenantFolder:
    """Installs tenants of one session from files below one folder."""

    def __init__(self, session: Session, folder: Path | None) -> None:
        """Name the folder; None turns everything off."""
        self._session = session
        self._folder = None if folder is None else folder.resolve()
        self._loading = asyncio.Lock()
        self._found: dict[str, Stamp] = {}
        """Tenants that `find` installed, to the file that was read last; those asked last stand last."""
        self._held: Counter[str] = Counter()
        """Tenants whose requests are on their way into the session."""

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """A request asks a tenant, which keeps its place until the request is in the session."""
        self._held[name] += 1
        if name in self._found:
            self._found[name] = self._found.pop(name)
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def find(self, name: str) -> bool:
        """Install the tenant of that name if the folder has it, in the place of an idle one where there is no other.

        One that was found before is read again where its file is another now. Where that fails it stays what it was,
        and a warning says so: a file may be in the middle of being copied.

        Raises:
            RefusalError: its file is none that may be read, or no place is free.
            IaptError: its file does not fit the bundle.
        """
        if self._folder is None or not NAME.fullmatch(name):
            return False
        if name == self._session.base or (name in self._session.tenants and name not in self._found):
            return True  # the backbone, the bundle's own, or loaded by name
        stamp = await asyncio.to_thread(stamp_of, self._folder / f"{name}{SUFFIX}")
        if stamp is None and name not in self._session.tenants:
            await asyncio.to_thread(self._check_folder)
        if stamp is None:
            return name in self._session.tenants
        async with self._loading:
            if name in self._session.tenants and self._found.get(name, stamp) != stamp:
                await self._renew(name, stamp)
            if name not in self._session.tenants:
                await self._install_in_place_of_another(name, f"{name}{SUFFIX}", replace=False)
                self._found[name] = stamp
        return True

    async def _renew(self, name: str, stamp: Stamp) -> None:
        """Put another file in the place of a tenant; its requests under way keep the old weights."""
        try:
            await self._install_in_place_of_another(name, f"{name}{SUFFIX}", replace=True)
            _log.info("tenant %s was read again, because its file is another now", name)
        except (IaptError, RefusalError) as error:
            if isinstance(error, RefusalError) and error.code == TENANTS_FULL:
                _log.warning(
                    "tenant %s has another file now, and no place is free: this request gets the old one", name
                )
                return  # the next request tries again
            _log.warning("tenant %s goes on with the file of before, because the new one is refused: %s", name, error)
        self._found[name] = stamp

    async def _install_in_place_of_another(self, name: str, path: str, *, replace: bool) -> None:
        """Install a tenant; where all places are taken, in that of an idle one which `find` installed.

        Raises:
            RefusalError: as `_install` and `_make_room`.
            IaptError: as `_install`.
        """
        while True:
            try:
                return await self._install(name, path, replace=replace)
            except TenantsFullError as error:
                await self._make_room(error.method, name)

    async def _make_room(self, method: str, name: str) -> None:
        """Take out the tenant of a method that `find` installed and that was not asked for the longest time.

        Args:
            method: whose places are all taken.
            name: for whom; it does not make room for itself.

        Raises:
            RefusalError: all of them have requests, or there is none.
        """
        asked = {name for name, tenant in self._session.state().tenants.items() if tenant.running or tenant.waiting}
        methods = {name: tenant.method for name, tenant in list(self._session.stepper.bank.tenants.items())}
        self._found = {name: stamp for name, stamp in self._found.items() if name in methods}
        found = [each for each in self._found if methods[each] == method]
        idle = next((each for each in found if each not in {*asked, name} and not self._held[each]), None)
        if idle is None:
            text = "all places for tenants are taken" + ("; try again later" if found else "")
            raise RefusalError(503, text, param="model", code=TENANTS_FULL, retry=bool(found))
        del self._found[idle]
        with contextlib.suppress(IaptError):  # somebody took it out at this moment
            self._session.remove_tenant(idle)
        _log.info("tenant %s was taken out for another", idle)

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Install a tenant, which then stays until it is taken out by name.

        Args:
            name: what to call it.
            path: of its file, below the folder.
            replace: take the place of a tenant of that name.

        Raises:
            RefusalError: a name or a path that is not allowed, or no such file.
            IaptError: the file does not fit the bundle.
        """
        async with self._loading:
            await self._install_in_place_of_another(name, path, replace=replace)
            self._found.pop(name, None)

    async def _install(self, name: str, path: str, *, replace: bool) -> None:
        if not NAME.fullmatch(name):
            raise RefusalError(400, f"{name!r} is no name; expected letters, digits, . _ -", param="lora_name")
        file = await asyncio.to_thread(self._checked, path)
        try:
            await asyncio.to_thread(self._session.add_tenant, file, name, replace=replace)
        except TenantsFullError:
            raise
        except IaptError as error:  # clients need not know where the folder is
            _log.warning("%s", error)
            told = refusal_of(error)
            told.message = told.message.replace(str(file), path)
            raise told from error

    def _check_folder(self) -> None:
        """Tell a folder without the file from one that is not there, as when its volume is gone.

        Raises:
            RefusalError: it cannot be read.
        """
        try:
            with os.scandir(self._folder):
                return
        except OSError as error:
            _log.warning("the folder of tenants cannot be read: %s", error)
            text = "the folder of tenants cannot be read; try again later"
            raise RefusalError(503, text, param="model", code="tenants_unreadable", retry=True) from error

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
