"""The commands as a user types them: what they print, what they leave behind, how they exit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import iapt_export
from iapt_export.contract.errors import REMEDIES, IaptError
from tests.bundles import NEW_TOKENS, TENANTS, TinyBuild, run

ROOT = Path(iapt_export.__file__).resolve().parent.parent


def test_verbose_says_what_passes_did(tiny_build: TinyBuild, tmp_path: Path) -> None:
    outcome = run(*tiny_build.arguments(tmp_path / "bundle", cache=tmp_path / "cache"), "-v")
    assert outcome.code == 0, outcome.err
    assert "decode.onnx: " in outcome.err


def test_a_second_build_says_up_to_date_and_writes_nothing(tiny_build: TinyBuild) -> None:
    def stamps() -> dict[str, int]:
        paths = [*tiny_build.bundle.rglob("*"), tiny_build.bundle]
        return {str(path): path.stat().st_mtime_ns for path in paths}

    before = stamps()
    outcome = run(*tiny_build.arguments(tiny_build.bundle))
    assert outcome.code == 0
    assert "looking for an up-to-date bundle" in outcome.err
    assert "tracing" not in outcome.err and "PyTorch generates" not in outcome.err
    assert f"{tiny_build.bundle} is ready; its report is {tiny_build.bundle / 'report.html'}" in outcome.err
    assert "verdict: pass" in outcome.out and "24 of 24 rows identical" in outcome.out
    assert stamps() == before


def test_build_prints_its_report_as_json(tiny_build: TinyBuild) -> None:
    outcome = run(*tiny_build.arguments(tiny_build.bundle), "--json", "--quiet")
    report = json.loads(outcome.out)
    assert (report["verdict"], report["tenants"]) == ("pass", list(TENANTS))
    assert report == json.loads((tiny_build.bundle / "report.json").read_text(encoding="utf-8"))
    assert "[" not in outcome.err, "no progress lines"


def test_validate_again(tiny_build: TinyBuild, tmp_path: Path) -> None:
    outcome = run("validate", tiny_build.bundle, f"--new-tokens={NEW_TOKENS}", f"--report={tmp_path / 'report'}")
    assert outcome.code == 0
    assert outcome.out.startswith("verdict: pass\n  onnxruntime fp32: pass, ")
    assert f"report: {tmp_path / 'report' / 'report.html'}" in outcome.err
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json"}
    report = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    built = json.loads((tiny_build.bundle / "report.json").read_text(encoding="utf-8"))
    assert report["command"] == built["command"] and ".building-" not in built["command"]
    assert built["targets"][0]["seconds"] == 0.0 < report["targets"][0]["seconds"]


def test_generate_streams_one_answer_and_lists_several(tiny_build: TinyBuild) -> None:
    prompts = ("--prompt=the film", "--prompt=a dull story")
    argv = ("generate", tiny_build.bundle, "--tenant=beta", "--max-new-tokens=6")
    one, several = run(*argv, prompts[0]), run(*argv, *prompts)
    data = run(*argv, *prompts, "--json")
    assert (one.code, several.code, data.code) == (0, 0, 0)
    rows = json.loads(data.out)
    assert [row["prompt"] for row in rows] == ["the film", "a dull story"]
    assert one.out == rows[0]["text"] + "\n"
    assert several.out == rows[0]["text"] + "\n---\n" + rows[1]["text"] + "\n"
    assert all(len(row["tokens"]) == 6 or row["finish_reason"] == "eos" for row in rows)
    assert one.err == several.err == data.err == ""


def test_generate_samples_by_seed(tiny_build: TinyBuild) -> None:
    def tokens(seed: int) -> list[int]:
        argv = ("generate", tiny_build.bundle, "--tenant=alpha", "--prompt=the film", "--max-new-tokens=12", "--json")
        return json.loads(run(*argv, "--temperature=1.5", "--top-p=0.95", f"--seed={seed}").out)[0]["tokens"]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


def test_inspect_knows_what_it_is_shown(tiny_build: TinyBuild) -> None:
    kinds = {
        tiny_build.bundle: ("bundle", "alpha"),
        tiny_build.adapters["beta"]: ("adapter", "down_weight"),
        tiny_build.bundle / "decode.onnx": ("ONNX graph", "past_key_values.0.key"),
    }
    for path, (kind, word) in kinds.items():
        data, shown = run("inspect", path, "--json"), run("inspect", path)
        assert (data.code, shown.code) == (0, 0), data.err + shown.err
        assert json.loads(data.out)["kind"] == kind
        assert word in data.out and kind in shown.out


def test_inspect_refuses_the_rest(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"not protobuf")
    for path, text in (
        (tmp_path / "nothing", "does not exist; expected an adapter directory, a tenant's file"),
        (tmp_path, "is none of what is known; expected an adapter directory, a tenant's file, a model"),
        (tmp_path / "empty.onnx", "is not an ONNX file"),
    ):
        outcome = run("inspect", path)
        assert outcome.code == 1 and text in outcome.err, outcome


def test_doctor() -> None:
    data, shown = run("doctor", "--json"), run("doctor")
    assert (data.code, shown.code) == (0, 0)
    findings = {finding["name"]: finding for finding in json.loads(data.out)}
    assert findings["onnxruntime"]["status"] == "ok"
    assert "onnxruntime" in shown.out


def test_results_that_cannot_be_written_are_refused_before_a_comparison(tiny_build: TinyBuild, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for flags, text in (
        (("--junit", tmp_path), "cannot be written: it is a folder; expected a file"),
        (("--report", tmp_path / "file"), "is a file; expected a folder to write into"),
    ):
        outcome = run("validate", tiny_build.bundle, "--quick", *flags)
        assert outcome.code == 1 and text in outcome.err and "loading" not in outcome.err, outcome.err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_train_then_build_then_generate(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """The whole path on one page: an adapter trained by the command is one that the other commands take."""
    data = tmp_path / "data.jsonl"
    lines = [{"instruction": f"is this positive? number {n}", "output": ("yes", "no")[n % 2]} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    adapter = tmp_path / "answers"
    settings = ("--bottleneck=8", "--max-steps=2", "--batch-size=2")
    trained = run("train", f"--model={tiny_build.model}", f"--data={data}", f"--output={adapter}", *settings, "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["output"] == str(adapter)
    build = TinyBuild(tiny_build.model, {"answers": adapter}, tiny_build.cache, tmp_path / "bundle")
    built = run(*build.arguments(build.bundle))
    assert built.code == 0, built.err
    assert "graphs are up to date" in built.err, "a tenant of the same kind needs no new graphs"
    answered = run("generate", build.bundle, "--tenant=answers", "--prompt=is this positive?", "--max-new-tokens=4")
    assert answered.code == 0, answered.err


@pytest.mark.slow
def test_build_in_fp16(tiny_build: TinyBuild, tmp_path: Path) -> None:
    outcome = run(*tiny_build.arguments(tmp_path / "bundle"), "--dtype=fp16", "--json")
    assert outcome.code == 0, outcome.err
    targets = json.loads(outcome.out)["targets"]
    assert [(target["dtype"], target["status"]) for target in targets] == [("fp16", "pass")] * 2
    answer = run("generate", tmp_path / "bundle", "--tenant=beta", "--prompt=the film", "--max-new-tokens=4", "--json")
    assert json.loads(answer.out)[0]["tokens"]


def test_an_error_is_one_line_unless_debugged(tmp_path: Path) -> None:
    outcome = run("validate", tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("iapt-export: error: ") and outcome.err.count("\n") == 1
    with pytest.raises(Exception, match=r"holds no manifest\.json"):
        run("validate", tmp_path, "--debug")


def test_a_closed_pipe_is_no_error_to_show(tiny_build: TinyBuild) -> None:
    command = f"{sys.executable} -m iapt_export inspect {tiny_build.bundle} --json | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, "reason", "/some/file")

    monkeypatch.setattr("iapt_export.contract.manifest.BundleManifest.load", fail)
    outcome = run("validate", tiny_build.bundle)
    assert outcome.code == 1
    assert outcome.err == f"iapt-export: error: reason: /some/file; {REMEDIES[number]}\n"


def test_a_defect_keeps_its_trace(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOENT, "a defect")

    monkeypatch.setattr("iapt_export.contract.manifest.BundleManifest.load", fail)
    with pytest.raises(OSError, match="a defect"):
        run("validate", tiny_build.bundle)


def test_the_backbones_revision_and_code_reach_the_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def load(name: str, **arguments: object) -> None:
        asked.update(arguments, name=name)
        raise IaptError("stop here")

    monkeypatch.setattr("trainers.training.evaluate_adapter.load_backbone", load)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "completion": "yes"}}\n' for i in range(20)), encoding="utf-8")
    places = [f"--data={data}", f"--output={tmp_path / 'a'}"]
    outcome = run("train", "--model=org/m", *places, "--revision=abc", "--trust-remote-code")
    assert (outcome.code, "stop here" in outcome.err) == (1, True)
    assert asked == {"name": "org/m", "dtype": "fp32", "revision": "abc", "trust_remote_code": True}
