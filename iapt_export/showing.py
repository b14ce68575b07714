"""What every command does with paths that it will write, with its result, and with an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from iapt_export.contract.errors import IaptError
from iapt_export.contract.places import check_outside_bundles


def check_folders(*paths: Path | None) -> None:
    """Refuse files that cannot be written, or would damage a bundle, before the work whose result they are to hold."""
    for path in paths:
        if path and not path.parent.is_dir():
            raise IaptError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
        check_outside_bundles(path, "the file")


def show(as_json: bool, data: Any, table: Any) -> None:
    """Data as JSON where asked for, else as a rich table."""
    from rich.console import Console

    if as_json:
        print_json(data)
    else:
        Console().print(table)


def show_report(as_json: bool, report: Any, summary: Callable[[Any], str]) -> None:
    """A comparison with PyTorch, in words or as JSON."""
    if as_json:
        print_json(report.to_dict())
    else:
        print(summary(report))


def show_answers(requests: Sequence[Any], answers: Iterable[Any], asked: Any, as_json: bool) -> None:
    """Answers in the order of their requests: of a file each as soon as it is there, of flags together."""
    rows = []
    for request, answer in zip(requests, answers, strict=True):
        found = {"text": answer.text, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
        if answer.error is not None:
            found["error"] = str(answer.error)
        if not asked.requests:
            given = "messages" if asked.messages else "prompt"
            rows.append({given: getattr(request, given), **found})
        elif as_json:
            print(json.dumps({"tenant": request.tenant, **found}, ensure_ascii=False), flush=True)
        else:
            failed = "" if answer.error is None else f"\n(failed: {answer.error})"
            print(f"--- {answer.index + 1} {request.tenant}\n{answer.text}{failed}", flush=True)
    if rows and as_json:
        print_json(rows)
    elif rows:
        print("\n---\n".join(row["text"] for row in rows))


def print_json(data: Any) -> None:
    """A result on stdout, for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def fail(text: str) -> None:
    """An error on stderr, for people."""
    print(f"iapt-export: error: {text}", file=sys.stderr)
