"""Errors that a user can fix. Standard library only, so that a deployment machine may import them."""

import errno


class IaptError(Exception):
    """Bad input, a missing file, a wrong flag: the text says what was expected, what came and what to try.

    The command line prints it without a stack trace and exits non-zero. Anything else that is
    raised is a defect of this project and keeps its trace.
    """


class BundleError(IaptError):
    """A bundle's file is missing, altered, of a newer schema, or contradicts another."""


class QueueFullError(IaptError):
    """As many requests wait as a session takes; try again later."""


class ParityError(IaptError):
    """An export does not compute what PyTorch computes."""


class NotRunnableError(IaptError):
    """This machine lacks what a target needs: a runtime, a driver, a GPU. The files themselves may be fine."""


EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "gguf", "yaml"), "train") | dict.fromkeys(
    ("onnx", "onnx_ir", "onnxscript", "matplotlib"), "export"
)
"""Packages that only some commands need, to the extra that brings them."""


def explain(error: Exception) -> str | None:
    """What a user can do about an error, or None when it is a defect of this project."""
    if isinstance(error, IaptError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
        return f"{error.name} is not installed and this command needs it; try: pip install 'iapt-export[{extra}]'"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (
            f"{error.strerror}: {error.filename or 'writing output'}; nothing was left half-written. Free space or "
            "choose another --output or --cache, then run the command again: it goes on where it stopped"
        )
    return None
