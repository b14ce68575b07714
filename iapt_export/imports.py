"""Import what is large in three quarters of the time, and let the interpreter end without taking it apart."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import in this context without collecting garbage, of which imports make next to none.

    torch, transformers and onnxscript make a million objects, which Python looks through again and again meanwhile:
    for 2.5 of a build's 9 seconds before its first step. What was imported stays out of later collections, too, among
    them those at the interpreter's end, which took 2 seconds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
