"""First light on a GPU: every claim that needs NVIDIA hardware, in numbered parts.

Each part of `tests.gpu.parts` runs in a process of its own, within its time limit and what is left of the budget; when
one fails the next goes on. Results are in ``result.json``, what belongs into docs/benchmarks.md in ``aftermath.md``,
all output in ``log.txt``. ``--rehearse`` runs the same code on the CPU at tiny size, and leaves out what cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.aftermath import machine, summary, write_aftermath
from tests.gpu.part import ERROR, SKIPPED, STOPPED

PACKAGE = "tests.gpu.parts"
PATIENCE = 4
"""Times its limit that a part may take in a rehearsal, whose machine may be slow and busy."""
GRACE_S = 5
"""Between asking a part to stop and ending it."""


@dataclass
class Started:
    """A part under way."""

    name: str
    module: Any
    process: subprocess.Popen[bytes]
    result: Path
    log: Path
    began: float
    limit_s: float


def part_names(package: str = PACKAGE) -> list[str]:
    """Names of all parts, in order."""
    folder = importlib.import_module(package).__path__
    return sorted(name for _, name, _ in pkgutil.iter_modules(folder) if name[:2].isdigit())


def start(name: str, limit_s: float, given: argparse.Namespace) -> Started:
    """Start a part in a process group of its own."""
    scratch = given.folder / "results"
    scratch.mkdir(parents=True, exist_ok=True)
    result, log = scratch / f"{name}.json", scratch / f"{name}.log"
    result.unlink(missing_ok=True)
    words = [sys.executable, "-m", "tests.gpu.run_part", name, "--device", given.device, "--folder", given.folder]
    words += ["--out", result, "--package", given.package, "--limit", limit_s]
    words += ["--tiny"] if given.rehearse else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    module = importlib.import_module(f"{given.package}.{name}")
    return Started(name, module, process, result, log, time.monotonic(), limit_s)


def finish(part: Started) -> dict[str, Any]:
    """Wait for a part, no longer than its limit, and read what it left."""
    stopped = False
    try:
        part.process.wait(max(part.limit_s - (time.monotonic() - part.began), 0))
    except subprocess.TimeoutExpired:
        stopped = True
    end_group(part.process)
    found: dict[str, Any] = {"status": ERROR, "reason": "", "figures": {}, "checks": [], "notes": []}
    if part.result.is_file():
        found |= json.loads(part.result.read_text(encoding="utf-8"))
    if stopped:
        found |= {"status": STOPPED, "reason": f"at its limit of {part.limit_s:.0f} s; figures are those before"}
    elif part.process.returncode != 0:
        lines = part.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found |= {"status": ERROR, "reason": f"exit code {part.process.returncode}; {lines[-1] if lines else ''}"}
    seconds = round(time.monotonic() - part.began, 1)
    return {"part": part.name, "title": part.module.TITLE, "seconds": seconds, **found}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and all that it started."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, word)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            break


def not_run(name: str, module: Any, reason: str) -> dict[str, Any]:
    """The result of a part that was not started."""
    empty: dict[str, Any] = {"figures": {}, "checks": [], "notes": []}
    return {"part": name, "title": module.TITLE, "seconds": 0.0, "status": SKIPPED, "reason": reason, **empty}


def run_parts(names: list[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run parts in order; one that is ``IN_BACKGROUND`` is waited for by those that need it, else at the end."""
    end = time.monotonic() + given.budget
    results: dict[str, dict[str, Any]] = {}
    behind: dict[str, Started] = {}
    for name in names:
        module = importlib.import_module(f"{given.package}.{name}")
        needed = getattr(module, "WAITS_FOR", None)
        if needed in behind:
            results[needed] = finish(behind.pop(needed))
            say(results[needed])
        left = end - time.monotonic()
        if left < 1:
            results[name] = not_run(name, module, "no time was left")
        else:
            print(f"{name}  {module.TITLE} …", flush=True)
            started = start(name, min(module.LIMIT_S * (PATIENCE if given.rehearse else 1), left), given)
            if getattr(module, "IN_BACKGROUND", False):
                behind[name] = started
                continue
            results[name] = finish(started)
        say(results[name])
        write(results, given)
    for name, part in behind.items():
        results[name] = finish(part)
        say(results[name])
    return [results[name] for name in names]


def say(result: dict[str, Any]) -> None:
    """A line on a part that is over."""
    print(f"{result['part']}  {result['status']}, {result['seconds']:.0f} s  {result['reason']}", flush=True)


def write(results: dict[str, dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Write what there is so far, so that nothing is lost when the machine goes."""
    command = "tests/gpu/first_light.sh " + " ".join(given.words)
    found = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command.strip(),
        "rehearsal": given.rehearse,
        "machine": machine(),
        "parts": [results[name] for name in sorted(results)],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_aftermath(found, given.output / "aftermath.md")
    logs = sorted((given.folder / "results").glob("*.log"))
    text = "".join(f"==== {log.stem}\n{log.read_text(encoding='utf-8', errors='replace')}\n" for log in logs)
    (given.output / "log.txt").write_text(text, encoding="utf-8")
    return found


def arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="first_light.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny size")
    parser.add_argument("--parts", help="their numbers, such as 0,1,3; all without it")
    parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="of all parts together; 570")
    parser.add_argument("--output", type=Path, default=Path("first-light"), help="folder of the results")
    parser.add_argument("--folder", type=Path, help="folder of models and bundles; a temporary one without it")
    parser.add_argument("--package", default=PACKAGE, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    given.words, given.device = words, "cpu" if given.rehearse else "cuda"
    return given


def main(words: list[str] | None = None) -> int:
    """Run the parts; returns 0 when none failed."""
    given = arguments(sys.argv[1:] if words is None else words)
    names = part_names(given.package)
    if given.parts:
        wanted = {int(number) for number in given.parts.split(",")}
        names = [name for name in names if int(name[:2]) in wanted]
    with contextlib.ExitStack() as stack:
        if given.folder is None:
            given.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-light-")))
        results = run_parts(names, given)
        found = write({result["part"]: result for result in results}, given)
    print(summary(found), flush=True)
    return 0 if all(result["status"] in ("pass", SKIPPED) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
