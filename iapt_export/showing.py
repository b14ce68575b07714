"""What every command does with its words, with paths that it will write, with its result, and with an error."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from cyclopts import (
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    Token,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from iapt_export.contract.errors import IaptError
from iapt_export.contract.places import check_outside_bundles
from trainers.methods.configs import of_another


def check_folders(*paths: Path | None, report: Path | None = None) -> None:
    """Refuse files that cannot be written, or would damage a bundle, before the work whose result they are to hold.

    Args:
        paths: of files.
        report: a folder, which may not be there yet.
    """
    check_outside_bundles(report, "--report")
    if report and report.exists() and not report.is_dir():
        raise IaptError(f"--report {report} is a file; expected a folder to write into")
    for path in paths:
        if path and not path.parent.is_dir():
            raise IaptError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
        if path and path.is_dir():
            raise IaptError(f"{path} cannot be written: it is a folder; expected a file")
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


def show_stream(tokens: Iterable[Any]) -> None:
    """The text of an answer's tokens as they come."""
    for token in tokens:
        print(token.text, end="", flush=True)
    print()


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


def whole_numbers(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number is wanted; the parser would round it."""
    for argument in arguments:
        for token in argument.tokens if _holds(argument.hint, int) else ():
            try:
                int(token.value)
            except ValueError:
                raise CoercionError(token=token, argument=argument, target_type=int) from None


def no_empty_paths(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse an empty text where a path belongs, such as an unset variable of a shell: it would mean this folder."""
    for argument in arguments:
        if any(token.value == "" for token in argument.tokens) and (argument.required or _holds(argument.hint, Path)):
            raise MissingArgumentError(argument=argument, keyword=argument.name)


def _holds(hint: Any, kind: type) -> bool:
    return hint is kind or any(_holds(inner, kind) for inner in get_args(hint))


def refusal(error: CycloptsError, app: App, method: str, argv: Sequence[str] = ()) -> str:
    """A wrong flag in one sentence, as the parser found it: which, what was expected, and where to read on.

    What a group of flags lacks often stands in ``argv``, misspelt; then that is said.
    """
    chain = tuple(error.command_chain or ())
    if isinstance(error, ValidationError) and (unknown := _unknown_flag(argv, chain, _arguments_of(app, chain))):
        error = unknown
    command = " ".join(("iapt-export", *chain))
    text = str(error)
    if isinstance(error, UnknownOptionError):
        text = (chain == ("train",) and of_another(error.token.keyword or error.token.value, method)) or text
    elif isinstance(error, UnusedCliTokensError):
        text = f"{' '.join(error.unused_tokens or [])!r} belongs to no flag"
    elif isinstance(error, RepeatArgumentError):
        text = f"{error.token.keyword} is given twice; rows of several tenants are asked for with --requests FILE.jsonl"
    elif isinstance(error, MissingArgumentError) and error.keyword:
        text = f"{error.keyword} needs a value"
    elif isinstance(error, MissingArgumentError):
        required = [
            argument.name for argument in _arguments_of(app, chain) if argument.required and argument.name != "*"
        ]
        text = f"{command} needs {', '.join(required)}; {error.argument and error.argument.name} is missing"
    return f"{text} (see {command} --help)"


def _arguments_of(app: App, chain: tuple[str, ...]) -> ArgumentCollection:
    return functools.reduce(App.__getitem__, chain, app).assemble_argument_collection()


def _unknown_flag(
    argv: Sequence[str], chain: tuple[str, ...], arguments: ArgumentCollection
) -> UnknownOptionError | None:
    """The first flag that the command has not, as the parser would have told it had the others been enough."""
    known = {name for argument in arguments for name in argument.names}
    known = {name for argument in arguments for name in argument.names}
    for flag in (word.partition("=")[0] for word in argv):
        if re.fullmatch("--?[a-z][a-z-]+", flag) and flag not in known:
            token = Token(keyword=flag, source="cli")
            return UnknownOptionError(token=token, argument_collection=arguments, command_chain=chain, verbose=False)
    return None
