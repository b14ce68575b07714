"""Who may ask which tenant: keys from a file, each with its tenants."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from pathlib import Path

from engines.http.refusals import RefusalError
from iapt_export.contract.errors import IaptError
from iapt_export.contract.schema import parse_json

ALL = "*"


class Access:
    """The keys of a server; without any, everybody may ask every tenant."""

    def __init__(self, keys: Mapping[str, list[str]] | None = None, admin_token: str | None = None) -> None:
        """Keep hashes of the keys.

        Args:
            keys: key to names of tenants, ``*`` for all of them.
            admin_token: what loading and unloading tenants needs; None turns that off.
        """
        self._allowed = {_digest(key): frozenset(tenants) for key, tenants in (keys or {}).items()}
        self._admin = None if admin_token is None else _digest(admin_token)

    @classmethod
    def read(cls, path: Path | None, admin_token: str | None) -> Access:
        """Keys from a JSON file: ``{"KEY": ["tenant", ...], "OTHER KEY": ["*"]}``.

        Raises:
            IaptError: there is no such file, or it holds something else.
        """
        if path is None:
            return cls(None, admin_token)
        expected = '{"KEY": ["tenant"], "OTHER KEY": ["*"]}'
        try:
            keys = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise IaptError(f"{path} cannot be read as JSON ({error}); expected {expected}") from error
        fits = isinstance(keys, dict) and all(
            key.strip() == key != "" and isinstance(names, list) and all(isinstance(name, str) for name in names)
            for key, names in keys.items()
        )
        if not fits or not keys:
            raise IaptError(f"{path} holds no keys with lists of tenants; expected {expected}")
        return cls(keys, admin_token)

    def check_tenants(self, known: Collection[str]) -> None:
        """Refuse keys for tenants that a server has not and cannot get.

        Raises:
            IaptError: which they are.
        """
        if strange := sorted({ALL}.union(*self._allowed.values()) - {ALL, *known}):
            raise IaptError(f"keys are for tenants {', '.join(strange)}; this server has {', '.join(known)}")

    def tenants_of(self, authorization: str | None) -> frozenset[str]:
        """The tenants that whoever sends this header may ask; ``*`` among them for all.

        Raises:
            RefusalError: no key, or an unknown one.
        """
        if not self._allowed:
            return frozenset((ALL,))
        found = self._allowed.get(_digest(_token(authorization)))
        if found is None:
            raise RefusalError(401, "the API key is missing or wrong", code="invalid_api_key")
        return found

    def check(self, authorization: str | None, tenant: str) -> None:
        """Refuse whoever may not ask this tenant.

        Raises:
            RefusalError: no key, an unknown one, or one for other tenants.
        """
        allowed = self.tenants_of(authorization)
        if ALL not in allowed and tenant not in allowed:
            raise RefusalError(
                403, f"this API key is not for the model {tenant!r}", param="model", code="model_not_allowed"
            )

    def check_admin(self, authorization: str | None) -> None:
        """Refuse whoever may not load and unload tenants.

        Raises:
            RefusalError: it is turned off, or the token is missing or wrong.
        """
        if self._admin is None:
            raise RefusalError(404, "loading tenants is turned off here", code="not_found")
        if not hmac.compare_digest(_digest(_token(authorization)), self._admin):
            raise RefusalError(401, "the admin token is missing or wrong", code="invalid_admin_token")


def _token(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    """Equal for equal keys; comparing digests tells nothing of the keys by its time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
