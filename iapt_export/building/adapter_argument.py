"""What ``--adapter`` says: a tenant's name, its folder, and what stock PEFT does not say of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from iapt_export.contract.errors import IaptError
from iapt_export.contract.prompt_format import ONE_OF, PROMPT_FORMATS
from iapt_export.contract.tenant_card import check_name

OPTION = re.compile(r"(?P<rest>.+),(?P<name>format|task)=(?P<value>[^,=]*)")
"""What may stand behind an adapter's folder."""


def parse_adapters(arguments: Iterable[str | Path]) -> dict[str, tuple[Path, dict[str, str]]]:
    """Read every ``--adapter``, see `parse_adapter`.

    Returns:
        Tenant to its folder and what is said of it.

    Raises:
        IaptError: a bad argument, or a name that is given twice.
    """
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for argument in map(str, arguments):
        name, path, options = parse_adapter(argument)
        if name in found:
            raise IaptError(f"two adapters are called {name!r}; tell them apart with --adapter NAME=DIR")
        found[name] = (path, options)
    return found


def parse_adapter(argument: str) -> tuple[str, Path, dict[str, str]]:
    """Read ``DIR`` or ``NAME=DIR``, with ``,format=chat`` or ``,task=0`` behind it.

    Returns:
        The tenant's name, which is the folder's unless one is given, its folder, and what is said of it.

    Raises:
        IaptError: an unknown format, a task that is no number, or a name that is none for a file.
    """
    options: dict[str, str] = {}
    rest = argument
    while match := OPTION.fullmatch(rest):
        rest = match["rest"]
        options[match["name"]] = match["value"]
    if "format" in options and options["format"] not in PROMPT_FORMATS:
        raise IaptError(f"--adapter {argument}: format is {options['format']!r}, expected {ONE_OF}")
    if "task" in options and not options["task"].isdecimal():
        raise IaptError(f"--adapter {argument}: task is {options['task']!r}, expected a number from 0")
    before, comma, after = rest.rpartition(",")
    if comma and not Path(rest.partition("=")[2] or rest).exists():
        raise IaptError(
            f"--adapter {argument}: {after!r} is no setting; expected DIR,format=chat (plain, newline) or DIR,task=0, "
            f"without spaces, and --adapter once for each adapter, {before} first"
        )
    given, equals, folder = rest.partition("=")
    path = Path(folder if equals else rest)
    if not (folder if equals else rest):
        raise IaptError(f"--adapter {argument}: the folder is empty; expected DIR or NAME=DIR")
    name = given if equals else path.resolve().name
    check_name(name, "give NAME=DIR")
    return name, path, options
