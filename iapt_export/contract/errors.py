"""Errors that a user can fix. Standard library only, so that a deployment machine may import them."""

import errno


class IaptError(Exception):
    """Bad input, a missing file, a wrong flag: the text says what was expected, what came and what to try.

    The command line prints it without a stack trace and exits non-zero. Anything else that is
    raised is a defect of this project and keeps its trace.
    """

    def __init__(self, *args: object, code: str = "invalid", field: str | None = None, remedy: str = "") -> None:
        """Say what is wrong.

        Args:
            args: the text.
            code: a word for programs, such as ``tenant_not_found``.
            field: the field of a request that is at fault, such as ``max_new_tokens``.
            remedy: what whoever runs the program can do, shown in brackets; a server's clients cannot, so it leaves
                that out.
        """
        super().__init__(f"{args[0]} ({remedy})" if remedy else "".join(map(str, args)))
        self.code = code
        self.field = field
        self.what = str(args[0]) if args else ""
        """The text without the remedy."""


class BundleError(IaptError):
    """A bundle's file is missing, altered, of a newer schema, or contradicts another."""


class QueueFullError(IaptError):
    """As many requests wait as a session takes; try again later."""


class ParityError(IaptError):
    """An export does not compute what PyTorch computes."""


class NotRunnableError(IaptError):
    """This machine lacks what a target needs: a runtime, a driver, a GPU. The files themselves may be fine."""


EXTRAS = (
    dict.fromkeys(("torch", "transformers", "accelerate", "gguf", "yaml"), "train")
    | dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "matplotlib"), "export")
    | {"cryptography": "sign"}
    | dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"), "serve")
)
"""Packages that only some commands need, to the extra that brings them."""


_ELSEWHERE = "write to another place"
REMEDIES = {
    errno.ENOSPC: "free space, then run the command again",
    errno.EDQUOT: "free space of your quota, then run the command again",
    errno.EFBIG: "the file system or a limit (ulimit -f) takes no such file; raise it or write to another place",
    errno.EACCES: f"get that permission, or {_ELSEWHERE}",
    errno.EPERM: f"get that permission, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EEXIST: "a file stands where a folder belongs; give another path",
    errno.ENOTDIR: "a part of the path is a file; expected a folder",
    errno.EISDIR: "it is a folder; expected a file",
    errno.ELOOP: "a link leads back to itself; remove it",
    errno.EIO: "the disk cannot be read or written there; check it",
}
"""What a user can do about an error of the file system, whatever the command."""


def explain(error: Exception) -> str | None:
    """What a user can do about an error, or None when it is a defect of this project."""
    if isinstance(error, IaptError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
        return f"{error.name} is not installed and this command needs it; try: pip install -e '.[{extra}]'"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.strerror}: {error.filename or 'writing a file'}; {REMEDIES[error.errno]}"
    return None


def shown(value: object, longest: int = 80) -> str:
    """A value in an error's text, cut to a readable length, whatever it is: also what ``repr`` itself fails at."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, lists in lists in lists, a class with a defect
        return f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
