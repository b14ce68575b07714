from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from engines import doctor
from engines.cuda import libraries
from engines.cuda.driver import Driver, Gpu
from engines.doctor import CUDA_PROVIDER, EXTRAS, LIMITED, MISSING, OK, TOOLS, Finding, abilities, diagnose, table

CUDA = "run on onnxruntime, --device cuda"
NO_DRIVER = Driver(problem="no NVIDIA driver found: libcuda.so.1 is missing")
ADA = Driver(gpus=(Gpu("NVIDIA RTX 4090", "8.9", 24 << 30),), cuda_version="13.1")
HOPPER = Driver(gpus=(Gpu("NVIDIA H200", "9.0", 141 << 30),), cuda_version="13.1")


def _machine(*missing: str, driver: Driver = ADA) -> list[Finding]:
    """Findings of a machine that has everything but what is named."""
    findings = [Finding("python", OK, "3.11.7")]
    findings += [
        Finding(name, MISSING, remedy=f"pip install {name}") if name in missing else Finding(name, OK, "1.0")
        for name in [*EXTRAS, CUDA_PROVIDER, *TOOLS]
    ]
    return [*findings, doctor._gpu(driver), Finding("disk", OK), Finding("memory", OK)]


def _able(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in abilities(findings)}


def test_everything_is_looked_for() -> None:
    findings = {finding.name: finding for finding in diagnose() if finding.kind == "part"}
    assert set(findings) == {"python", *EXTRAS, CUDA_PROVIDER, "gpu", *TOOLS, "disk", "memory"}
    assert findings["python"].version == ".".join(map(str, sys.version_info[:3]))
    assert all(finding.status in (OK, LIMITED, MISSING) for finding in findings.values())
    assert all(finding.remedy for finding in findings.values() if finding.status == MISSING)
    assert all(finding.version for finding in findings.values() if finding.name in EXTRAS and finding.status == OK)
    assert "cpu" in findings["onnxruntime"].detail


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from engines.doctor import diagnose; diagnose()\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'rich') "
        "if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"


def test_a_machine_with_everything_can_do_everything() -> None:
    assert set(_able(_machine()).values()) == {OK}


def test_a_machine_without_a_gpu_builds_and_does_not_run() -> None:
    able = _able(_machine(driver=NO_DRIVER))
    assert able["build tensorrt-rtx engines"] == OK
    assert able["run tensorrt-rtx engines"] == MISSING
    assert able["build tensorrt engines"] == MISSING
    assert able["run on onnxruntime"] == OK
    assert able["run on onnxruntime, --device cuda"] == MISSING


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("accelerate", {"train adapters"}),
        ("torch", {"train adapters", "export bundles"}),
        ("onnxscript", {"export bundles"}),
        ("onnxruntime", {"run on onnxruntime"}),
        ("tensorrt_rtx", {"build tensorrt-rtx engines", "run tensorrt-rtx engines"}),
        ("tensorrt", {"build tensorrt engines", "run tensorrt engines"}),
        ("cuda.bindings", {CUDA, "run tensorrt-rtx engines", "run tensorrt engines"}),
        ("cmake", {"compile the C++ parts"}),
        ("nvcc", set()),
    ],
)
def test_what_a_missing_thing_costs(missing: str, lost: set[str]) -> None:
    findings = _machine(missing)
    assert {name for name, status in _able(findings).items() if status == MISSING} == lost
    for finding in abilities(findings):
        if finding.name in lost:
            assert finding.detail == f"no {missing}"
            assert finding.remedy == f"pip install {missing}"


def test_a_gpu_that_rtx_does_not_serve() -> None:
    findings = abilities(_machine(driver=HOPPER))
    (run,) = [finding for finding in findings if finding.name == "run tensorrt-rtx engines"]
    assert run.status == MISSING
    assert run.detail.startswith("this GPU has compute capability 9.0, tensorrt-rtx serves 7.5, 8.0")
    assert run.remedy == "use a GPU of one of these, or --target tensorrt"
    assert _able(_machine(driver=HOPPER))["run tensorrt engines"] == OK
    both = dataclasses.replace(HOPPER, gpus=(*HOPPER.gpus, *ADA.gpus))
    assert _able(_machine(driver=both))["run tensorrt-rtx engines"] == OK, "one of the GPUs serves"
    reworded = [
        dataclasses.replace(part, detail="in other words") if part.name == "gpu" else part
        for part in _machine(driver=HOPPER)
    ]
    assert _able(reworded)["run tensorrt-rtx engines"] == MISSING, "told by a field, not by prose"


def test_the_gpu_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_driver_version", lambda: "driver 580.65.06")
    words = "NVIDIA RTX 4090, compute capability 8.9, 24 GiB"
    assert doctor._gpu(ADA) == Finding("gpu", OK, "driver 580.65.06 CUDA 13.1", words, compute_capabilities=("8.9",))
    missing = doctor._gpu(NO_DRIVER)
    assert (missing.status, missing.version) == (MISSING, "")
    assert missing.detail == "no NVIDIA driver found: libcuda.so.1 is missing"
    assert missing.remedy == "run on a machine with an NVIDIA GPU and driver 580 or newer"


def test_the_drivers_version_comes_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_output", lambda command: "580.65.06\n580.65.06")
    assert doctor._driver_version() == "driver 580.65.06"
    monkeypatch.setattr(doctor, "_output", lambda command: "")
    assert doctor._driver_version() == ""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._driver_version() == ""


def test_a_missing_module_and_tool() -> None:
    assert doctor._module("no_such_module", "train") == Finding(
        "no_such_module", MISSING, remedy="pip install -e '.[train]'"
    )
    assert doctor._module("no_such_parent.child", "train").status == MISSING
    assert doctor._tool("no-such-tool", "apt-get install it") == Finding(
        "no-such-tool", MISSING, remedy="apt-get install it"
    )
    assert doctor._version("no_such_module") == ""
    assert doctor._install("cuda.bindings", "tensorrt-rtx") == "pip install cuda-bindings"


def test_a_command_that_fails_says_nothing() -> None:
    assert doctor._output([sys.executable, "-c", "print('1.2.3')"]) == "1.2.3"
    assert doctor._output([sys.executable, "-c", "raise SystemExit(1)"]) == ""
    assert doctor._output(["no-such-tool"]) == ""


def test_providers_are_read_from_the_libraries(tmp_path: Path) -> None:
    (tmp_path / "capi").mkdir()
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so", "libonnxruntime.so.1.31.1"):
        (tmp_path / "capi" / name).touch()
    assert doctor._providers([str(tmp_path)]) == ["cpu", "cuda"]


def a_gpu_build(folder: Path) -> Path:
    """Files of ONNX Runtime's GPU build for CUDA 13."""
    (folder / "capi").mkdir(parents=True)
    (folder / "capi" / "libonnxruntime_providers_cuda.so").touch()
    record = "package_name = 'onnxruntime-gpu'\ncuda_version = '13.0'\n"
    (folder / "capi" / "build_and_package_info.py").write_text(record, encoding="utf-8")
    return folder


def test_a_build_of_onnx_runtime_without_cuda(tmp_path: Path) -> None:
    finding = doctor._cuda_provider([str(tmp_path)])
    assert (finding.status, finding.detail) == (MISSING, "this ONNX Runtime has no CUDA provider")
    assert finding.remedy == "pip uninstall onnxruntime, then pip install -e '.[gpu]'"


def test_libraries_of_cuda_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, there = a_gpu_build(tmp_path / "onnxruntime"), tmp_path / "libraries"
    there.mkdir()
    for name in libraries.NEEDED["13"]:
        (there / name).touch()
    monkeypatch.setattr(libraries, "_known_to_the_loader", set)
    monkeypatch.setattr(libraries, "_own_folders", lambda: [there])
    assert doctor._cuda_provider([str(build)]) == Finding(CUDA_PROVIDER, OK, "CUDA 13")
    for name in ("libcublas.so.13", "libcudnn.so.9"):
        (there / name).unlink()
    finding = doctor._cuda_provider([str(build)])
    assert (finding.status, finding.version) == (MISSING, "CUDA 13")
    assert finding.detail == "no libcublas.so.13, libcudnn.so.9"
    assert "onnxruntime-gpu[cuda,cudnn]" in finding.remedy
    lost = {f.name: f for f in abilities([*_machine(CUDA_PROVIDER)[:-1], finding, Finding("memory", OK)])}
    assert lost[CUDA].status == MISSING and lost[CUDA].detail == finding.detail


def test_libraries_are_loaded_from_nvidias_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13"):
        (tmp_path / name).write_bytes(b"no library")
    loaded: list[str] = []

    def load(path: str, mode: int) -> None:
        loaded.append(Path(path).name)
        if "cudart" in path:
            raise OSError("invalid ELF header")

    monkeypatch.setattr(libraries.ctypes, "CDLL", load)
    monkeypatch.setattr(libraries, "_own_folders", lambda: [tmp_path / "none", tmp_path])
    libraries.load_libraries("13")
    assert loaded == ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13"], "what one needs comes before it"
    libraries.load_libraries("")
    assert len(loaded) == 3


def test_what_the_loader_knows_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "2 libs found\n\tlibcudart.so.13 (libc6,x86-64) => /usr/lib/libcudart.so.13\n"
    done = subprocess.CompletedProcess([], 0, said)
    monkeypatch.setattr(libraries.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(libraries, "_own_folders", list)
    assert libraries.missing_libraries("13") == list(libraries.NEEDED["13"][1:])
    assert libraries.missing_libraries("14") == [], "nothing is known of what it needs"


def test_too_little_disk_and_memory_are_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1 << 30)
    disk = doctor._disk(tmp_path / "not" / "yet" / "there")
    assert disk.status == LIMITED
    assert disk.detail.endswith(f"free at {tmp_path}; the demo needs {1 << 30} GiB")
    assert disk.remedy == "free some space"
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (8 << 30, 2 << 30))
    memory = doctor._memory()
    assert memory.status == LIMITED
    assert memory.detail.startswith("8 GiB, 2 GiB of them free; ")
    assert memory.remedy.startswith("close other programs")


def test_the_table_shows_every_word() -> None:
    findings = _machine("torch", driver=NO_DRIVER)
    findings.append(Finding("x", MISSING, remedy="pip install -e '.[train]'"))
    stream = io.StringIO()
    Console(file=stream, width=200).print(table([*findings, *abilities(findings)]))
    text = stream.getvalue()
    assert "try: pip install -e '.[train]'" in text  # square brackets are no markup
    assert "no NVIDIA driver found: libcuda.so.1 is missing; try: run on a machine with an NVIDIA GPU" in text
    assert "This machine can" in text
    assert "also without a GPU, for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in text


def test_the_data_is_json() -> None:
    data = json.loads(json.dumps([dataclasses.asdict(finding) for finding in diagnose()]))
    assert set(data[0]) == {"name", "status", "version", "detail", "remedy", "kind", "compute_capabilities"}
    assert [finding["name"] for finding in data if finding["kind"] == "ability"] == [
        "train adapters",
        "export bundles",
        "run on onnxruntime",
        CUDA,
        "build tensorrt-rtx engines",
        "run tensorrt-rtx engines",
        "build tensorrt engines",
        "run tensorrt engines",
        "compile the C++ parts",
    ]
