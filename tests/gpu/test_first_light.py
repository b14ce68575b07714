"""First light rehearsed: the runner over played parts, each part on the CPU at tiny size, and what travels."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from engines.cuda.driver import find_driver
from tests.bundles import TinyBuild
from tests.gpu import first_light
from tests.gpu.part import FAIL, PASS, SKIPPED, Skip, Work, carry_out
from tests.gpu.thin import MAGIC, thin

ROOT = Path(__file__).resolve().parents[2]
PLAYED = {
    "00_behind": "import time\nTITLE = 'Behind'\nLIMIT_S = 60\nIN_BACKGROUND = True\n"
    "def run(work):\n    time.sleep(0.2)\n    (work.folder / 'made').touch()\n    work.record(ready='yes')\n",
    "01_good": "TITLE = 'Good'\nLIMIT_S = 60\n"
    "def run(work):\n    work.row('rates', dtype='fp32', ms=1.25)\n    work.check('it holds', True)\n",
    "02_bad": "TITLE = 'Bad'\nLIMIT_S = 60\nWAITS_FOR = '00_behind'\n"
    "def run(work):\n    work.check('the other is done', (work.folder / 'made').exists())\n"
    "    work.check('it | holds', False, 'off by 2')\n    work.attempt('a step', lambda: 1 / 0)\n",
    "03_raises": "TITLE = 'Raises'\nLIMIT_S = 60\ndef run(work):\n    raise ValueError('no such thing')\n",
    "04_dies": "import os\nTITLE = 'Dies'\nLIMIT_S = 60\n"
    "def run(work):\n    print('last words', flush=True)\n    os._exit(9)\n",
    "05_hangs": "import subprocess, time\nTITLE = 'Hangs'\nLIMIT_S = 1\n"
    "def run(work):\n    work.record(child=subprocess.Popen(['sleep', '61']).pid)\n    time.sleep(60)\n",
    "06_lacks": "from tests.gpu.part import Skip\nTITLE = 'Lacks'\nLIMIT_S = 60\n"
    "def run(work):\n    raise Skip('no such library')\n",
}


def part(name: str) -> object:
    return importlib.import_module(f"tests.gpu.parts.{name}")


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "played_parts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in PLAYED.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return folder.name


def test_parts_go_on_when_one_fails(played: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["--rehearse", "--package", played, "--output", str(output), "--folder", str(tmp_path / "work")]
    assert first_light.main(words) == 1
    found = json.loads((output / "result.json").read_text(encoding="utf-8"))
    assert {each["part"][:2]: each["status"] for each in found["parts"]} == {
        "00": "pass",
        "01": "pass",
        "02": "fail",
        "03": "error",
        "04": "error",
        "05": "stopped",
        "06": "skipped",
    }
    by_name = {each["part"]: each for each in found["parts"]}
    assert by_name["02_bad"]["checks"][0]["passed"], "it did not wait for the part that it needs"
    assert by_name["02_bad"]["checks"][2]["found"] == "ZeroDivisionError: division by zero"
    assert by_name["04_dies"]["reason"] == "exit code 9; last words"
    child = by_name["05_hangs"]["figures"]["child"]
    status = Path(f"/proc/{child}/stat")  # a zombie is ended too, and waits for whoever is its parent now
    assert not status.exists() or status.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    text = (output / "aftermath.md").read_text(encoding="utf-8")
    for line in (
        "## Rehearsal on the CPU: no figure here is of a GPU",
        "| fp32 | 1.25 |",
        "| it \\| holds | **no** | off by 2 |",
        "Part 06_lacks: skipped (no such library), 0 s.",
    ):
        assert line in text, line
    said = capfd.readouterr().out
    assert said.rindex("REHEARSAL on the CPU") > said.rindex("05_hangs  stopped"), "the summary comes last"
    assert "FAIL it | holds: off by 2" in said
    assert "last words" in (output / "log.txt").read_text(encoding="utf-8")


def test_no_part_begins_when_the_time_is_over(played: str, tmp_path: Path) -> None:
    words = ["--rehearse", "--package", played, "--output", str(tmp_path / "out"), "--parts", "5,1", "--budget", "1.5"]
    assert first_light.main(words) == 1
    parts = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["parts"]
    assert [each["part"] for each in parts] == ["01_good", "05_hangs"]
    assert parts[1]["seconds"] < 10
    assert parts[1]["reason"] in ("no time was left", "at its limit of 1 s; figures are those before")


def test_every_part_says_what_it_is() -> None:
    names = first_light.part_names()
    assert [name[:2] for name in names] == ["00", "01", "02", "03", "04", "05", "06"]
    for name in names:
        module = importlib.import_module(f"tests.gpu.parts.{name}")
        assert module.TITLE and 0 < module.LIMIT_S <= 600 and callable(module.run), name
        assert getattr(module, "WAITS_FOR", names[0]) in names, name


@pytest.fixture
def bare(tmp_path: Path) -> Work:
    """What a part gets that needs no model."""
    return Work("cpu", tmp_path, tiny=True)


@pytest.fixture
def work(tiny_build: TinyBuild, tmp_path: Path) -> Work:
    """What part 0 leaves, of the bundle that tests share."""
    (tmp_path / "model").symlink_to(tiny_build.model)
    (tmp_path / "iapt-fp32").symlink_to(tiny_build.bundle)
    return Work("cpu", tmp_path, tiny=True)


def test_the_device_rehearsed(work: Work) -> None:
    done = carry_out(part("01_device").run, work)  # type: ignore[attr-defined]
    assert done.status == PASS, (done.reason, done.checks)
    assert done.figures["copy_gb_s"] > 0
    assert [row["dtype"] for row in done.figures["matrix_rate"]] == ["fp32", "fp16", "bf16"]
    errors = {(row["dtype"], row["stage"]): row for row in done.figures["errors"]}
    assert len(errors) == 6
    for stage in ("prefill", "decode"):
        assert errors["fp32", stage]["logits_worst"] < 1e-5 < errors["fp16", stage]["logits_worst"]
        assert errors["fp16", stage]["logits_worst"] < errors["bf16", stage]["logits_worst"]


def test_the_rational_kernels_lines_are_read(bare: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    program = bare.folder / "played"
    lines = "copy 2500.0 GB/s\ntime fp32 shared 100000 0.00400 ms, floor 0.00032 ms\n"
    lines += "time fp16 per-row 100000000 0.40000 ms, floor 0.16000 ms\nall comparisons agree\n"
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{lines}E\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("RATIONAL_GPU_TEST", str(program))
    done = carry_out(part("02_rational").run, bare)  # type: ignore[attr-defined]
    assert done.status == FAIL
    assert [check["passed"] for check in done.checks] == [True, False], "small tensors may be slow"
    assert [row["ratio"] for row in done.figures["times"]] == [pytest.approx(12.5), pytest.approx(2.5)]
    program.write_text("#!/bin/sh\necho 'fp32 form A: 3 of 9 values differ' >&2; exit 1\n", encoding="utf-8")
    done = carry_out(part("02_rational").run, Work("cpu", bare.folder, tiny=True))  # type: ignore[attr-defined]
    assert done.checks == [
        {
            "check": "every bit equals the CPU kernel's",
            "passed": False,
            "found": "fp32 form A: 3 of 9 values differ",
        }
    ]


def test_onnx_runtime_rehearsed(work: Work, engine_bundle: Path) -> None:
    done = carry_out(part("03_onnxruntime").run, work)  # type: ignore[attr-defined]
    assert done.status == PASS, (done.reason, [check for check in done.checks if not check["passed"]])
    assert [(row["what"], row["identical"]) for row in done.figures["tokens"]] == [
        ("iapt-fp32, portable graphs", 4),
        ("iapt-fp32, in place", 4),
    ]
    assert {"prefill logits", "decode cache"} <= {row["stage"] for row in done.figures["parity"]}
    captured = Work("cpu", work.folder, tiny=True)
    part("03_onnxruntime").cuda_graph(captured, engine_bundle)  # type: ignore[attr-defined]
    assert len(captured.checks) == 3 and all(check["passed"] for check in captured.checks), captured.checks


def test_speed_rehearsed(work: Work) -> None:
    (work.folder / "plain-fp32").symlink_to(work.folder / "iapt-fp32")
    done = carry_out(part("04_speed").run, work)  # type: ignore[attr-defined]
    failed = [check for check in done.checks if not check["passed"]]
    assert done.status == PASS, (done.reason, failed)
    kinds = {(row["what"], row["rows"]) for row in done.figures["speed"]}
    assert {("ours", 1), ("PyTorch eager", 2), ("torch.compile", 2)} <= kinds
    assert all(row["decode_ms"] > 0 < row["prefill_ms"] for row in done.figures["speed"])
    assert len(done.figures["goals"]) == 4, (done.figures["goals"], done.notes)
    assert any("part 1 measured no bandwidth" in note for note in done.notes)


@pytest.mark.skipif(not find_driver().problem, reason="a GPU is here: the part asks it instead of a played one")
def test_tensorrt_rehearsed(bare: Work) -> None:
    done = carry_out(part("05_tensorrt").run, bare)  # type: ignore[attr-defined]
    assert done.status == PASS, done.checks
    assert "NVIDIA H100 (compute capability 9.0) cannot run this engine" in done.checks[0]["found"]


def test_the_quality_plan_rehearsed(bare: Work) -> None:
    """Its program ended at an import once, where part 6 would have been the first to start it."""
    done = carry_out(part("06_quality").run, bare)  # type: ignore[attr-defined]
    assert done.status == PASS and len(done.checks) == 2, (done.reason, done.checks)


def test_a_part_that_lacks_something(bare: Work) -> None:
    def run(_: Work) -> None:
        raise Skip("no such library")

    done = carry_out(run, bare)
    assert (done.status, done.reason) == (SKIPPED, "no such library")


def a_library(*archs: int, broken: bool = False) -> bytes:
    """Bytes like those of a CUDA library: a container with code for each generation."""
    entries = b""
    for arch in archs:
        code = bytes([arch]) * 40
        header = struct.pack("<HHIQ", 2, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", arch)
        entries += header.ljust(64, b"\0") + code
    return b"ELF" + MAGIC + struct.pack("<Q", len(entries) + 8 * broken) + entries + b"the end of the library"


def test_a_library_keeps_the_code_of_one_generation(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(a_library(75, 90, 120))
    assert thin(library, 90) == {75: 40, 90: 40, 120: 40}
    left = library.read_bytes()
    assert len(left) == len(a_library(75, 90, 120)) and left.endswith(b"the end of the library")
    assert bytes([90]) * 40 in left and bytes([75]) * 40 not in left and bytes([120]) * 40 not in left


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (a_library(75, 80), r"has code for \[75, 80\], none for 90; nothing was changed"),
        (b"no library", "has code for no GPU, none for 90"),
        (a_library(90, broken=True), "is not laid out as expected: nothing was changed"),
    ],
)
def test_a_library_that_cannot_be_thinned(tmp_path: Path, content: bytes, problem: str) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        thin(library, 90)
    assert library.read_bytes() == content


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source {ROOT}/tests/gpu/parcels.sh; {text}"
    environment = {**os.environ, "PART_BYTES": "3000"}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_parcel_comes_back_whole(tmp_path: Path) -> None:
    (tmp_path / "given" / "deep").mkdir(parents=True)
    content = os.urandom(10_000)
    (tmp_path / "given" / "deep" / "file").write_bytes(content)
    (tmp_path / "pieces").mkdir()
    assert shell("parcel big given pieces", tmp_path).returncode == 0
    pieces = sorted((tmp_path / "pieces").glob("big.[0-9][0-9]"))
    assert len(pieces) >= 4 and max(piece.stat().st_size for piece in pieces) <= 3000
    kept = pieces[1].read_bytes()
    pieces[1].unlink()
    waiting = shell("unparcel big pieces taken", tmp_path)
    assert (waiting.returncode, waiting.stdout.strip()) == (0, "big waits for big.01")
    pieces[1].write_bytes(kept[::-1])
    damaged = shell("unparcel big pieces taken", tmp_path)
    assert damaged.returncode == 1 and "big is damaged: send it again" in damaged.stderr
    assert not (tmp_path / "taken").exists()
    pieces[1].write_bytes(kept)
    assert shell("unparcel big pieces taken", tmp_path).stdout.strip() == "big is unpacked into taken"
    assert (tmp_path / "taken" / "deep" / "file").read_bytes() == content


def test_the_script_says_what_it_can_do() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    script = [str(ROOT / "tests" / "gpu" / "first_light.sh"), "--help"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert "--rehearse" in done.stdout
    for name in ("pack.sh", "unpack.sh", "parcels.sh", "first_light.sh"):
        subprocess.run(["bash", "-n", str(ROOT / "tests" / "gpu" / name)], check=True)
