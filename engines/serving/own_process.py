"""A session belongs to the process that opened it: a forked child has its memory, but not its thread."""

from __future__ import annotations

import os
import threading

from iapt_export.contract.errors import IaptError


def check_process(owner: int | None) -> None:
    """Refuse to go on in a forked child, which would wait for ever.

    Args:
        owner: the process that has the session's thread; None where none has.

    Raises:
        IaptError: this is another process.
    """
    if owner not in (None, os.getpid()):
        raise IaptError(
            f"the session was activated in process {owner}, and this is a forked child of it ({os.getpid()}), where "
            "its thread does not run; open a session in the child, or start it with the method spawn"
        )


class OwnCondition(threading.Condition):
    """A condition that one process owns once `own` was called there; in forked children it refuses to be taken."""

    def __init__(self) -> None:
        super().__init__()
        self._owner: int | None = None

    def own(self) -> None:
        """Let it be this process's."""
        self._owner = os.getpid()

    def __enter__(self) -> bool:
        """Take it; raises like `check_process`."""
        check_process(self._owner)
        return super().__enter__()
