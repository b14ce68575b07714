"""The kernel of ai.iapt::Rational: every bit against the CPU's, and its time against that of a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.gpu.part import Skip, Work

TITLE = "Rational kernel"
LIMIT_S = 150
ROOT = Path(__file__).resolve().parents[3]
SKIPPED = 77
LINE = re.compile(r"time (\w+) ([\w-]+) (\d+) ([\d.]+) ms, floor ([\d.]+) ms")
LARGE = 10**8
"""Values from which on launching does not count."""
GOAL = 1.5
"""Times the copy's time, from `LARGE` values on."""
SOURCES = (
    "engines/cpp/op/rational_cuda.cu",
    "engines/cpp/op/rational_cpu.cc",
    "tests/native/rational_gpu_test.cc",
)


def run(work: Work) -> None:
    """Take the program that ``RATIONAL_GPU_TEST`` names, or compile it, and run it."""
    program = Path(os.environ.get("RATIONAL_GPU_TEST", "")) if "RATIONAL_GPU_TEST" in os.environ else compiled(work)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode == SKIPPED:
        raise Skip(f"compiled; {done.stdout.strip()}")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    work.check("every bit equals the CPU kernel's", done.returncode == 0, said[-1] if said else "it prints nothing")
    read_times(work, done.stdout)


def compiled(work: Work) -> Path:
    """The program, for Hopper alone."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise Skip("no nvcc here; it is in NVIDIA's CUDA toolkit")
    program = work.folder / "rational_gpu_test"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-fmad=false", "-Xcompiler=-ffp-contract=off"]
    command += ["-Xptxas=-v", f"-I{ROOT}/engines/cpp/op", "-o", str(program), *(str(ROOT / name) for name in SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    if done.returncode:
        raise RuntimeError(f"nvcc fails: {done.stderr.strip()[-300:]}")
    work.record(registers=max(registers, default=0), spilled_bytes=spilled)
    return program


def read_times(work: Work, text: str) -> None:
    """The program's lines as a table, and the goal."""
    if found := re.search(r"copy ([\d.]+) GB/s", text):
        work.record(copy_gb_s=float(found[1]))
    for dtype, coefficients, count, ms, floor in LINE.findall(text):
        ratio = float(ms) / float(floor)
        work.row(
            "times", dtype=dtype, coefficients=coefficients, values=int(count), ms=float(ms), copy_ms=float(floor),
            ratio=ratio,
        )  # fmt: skip
        if int(count) >= LARGE:
            work.check(
                f"{dtype} {coefficients} {int(count):.0e} values: within {GOAL} copies", ratio <= GOAL, f"{ratio:.2f}"
            )
