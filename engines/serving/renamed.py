"""Old names of fields, which work for one release and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass's fields be given and read by their old names too, with a `DeprecationWarning`.

    Args:
        names: old name to the field that it stands for.
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def with_old_names(self: T, *args: Any, **fields: Any) -> None:
            for old in names.keys() & fields:
                if names[old] in fields:
                    raise TypeError(f"{cls.__name__} got {names[old]} and its old name {old}; give only the first")
                _warn(cls, old, names[old])
                fields[names[old]] = fields.pop(old)
            init(self, *args, **fields)

        changes = {"__init__": with_old_names} | {old: _property(cls, old, new) for old, new in names.items()}
        for name, value in changes.items():
            setattr(cls, name, value)
        return cls

    return decorate


def _property(cls: type, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        _warn(cls, old, new)
        return getattr(self, new)

    return property(read)


def _warn(cls: type, old: str, new: str) -> None:
    text = f"{cls.__name__}.{old} is called {new}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
