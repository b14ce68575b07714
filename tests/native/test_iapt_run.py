"""``iapt_run`` answers as ``iapt-export generate`` does: token for token, and text for text."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines.cuda.driver import find_driver
from engines.serving.session import Request, Session
from engines.serving.tenants import read_tenant_file
from iapt_export.building.probes import make_probes
from tests.bundles import PROMPTS, TENANTS, TinyBuild, change_manifest, rehash, run
from tests.graphs import with_engine_graphs
from tests.native.built import FUZZER, RUNNER, TENSORRT_RUNNER, TOKENIZER, needs_fuzzer, needs_runner, needs_tokenizer
from tests.native.tokenizers_of import gemma, save
from trainers.decoder.backbone import load_backbone

MULTIBYTE = "quiet joy — é 日本語 🎉"


def iapt_run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUNNER, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False)


def answers(*argv: str | Path) -> list[dict[str, Any]]:
    outcome = iapt_run(*argv, "--json")
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


def wanted(*argv: str | Path) -> str:
    outcome = run("generate", *argv, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.out


@needs_runner
@needs_tokenizer
@pytest.mark.parametrize(
    "sampling",
    [
        [],
        ["--temperature=0.8", "--top-p=0.9", "--seed=7"],
        ["--temperature=2"],
        ["--temperature=1e-310", "--top-p=0.9"],
    ],
)
@pytest.mark.parametrize("tenant", TENANTS)
def test_the_same_answers_as_python(tiny_build: TinyBuild, tenant: str, sampling: list[str]) -> None:
    """``gamma`` takes prompts as they are, ``alpha`` with a line break, ``beta`` in a template; lengths differ."""
    prompts = [f"--prompt={text}" for text in (*PROMPTS[:3], MULTIBYTE)]
    flags = [tiny_build.bundle, f"--tenant={tenant}", *prompts, "--max-new-tokens=24", *sampling]
    expected = wanted(*flags)
    for cache in ([], ["--portable"]):
        made = iapt_run(*flags, *cache, "--json")
        assert made.returncode == 0, made.stderr
        assert made.stdout == expected, cache


@needs_runner
@needs_tokenizer
def test_the_graphs_of_tensorrts_engines(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """The stepper that runs them on a GPU, over ONNX Runtime."""
    bundle = with_engine_graphs(tiny_build.bundle, tmp_path / "bundle", load_backbone(str(tiny_build.model)).model)
    for tenant in TENANTS:
        flags = [f"--tenant={tenant}", *(f"--prompt={text}" for text in PROMPTS[:3]), "--max-new-tokens=24"]
        made = iapt_run(bundle, *flags, "--json")
        assert made.returncode == 0, made.stderr
        assert made.stdout == wanted(tiny_build.bundle, *flags) == wanted(bundle, *flags)


@needs_runner
@needs_tokenizer
def test_one_prompt_streams_text(tiny_build: TinyBuild) -> None:
    flags = [tiny_build.bundle, "--tenant", "alpha", "--prompt", MULTIBYTE, "--max-new-tokens", "12"]
    assert iapt_run(*flags).stdout == run("generate", *flags).out


@needs_runner
@needs_tokenizer
def test_characters_of_several_tokens_are_cut_as_python_cuts_them(tiny_bundle: Path) -> None:
    """Over a tokenizer that spells in bytes, of which a run with half a character at its end decodes to none at all."""
    (tiny_bundle / "chat_template.jinja").unlink()
    make_probes(save(tiny_bundle, gemma())).save(tiny_bundle)
    rehash(tiny_bundle)
    prompts, steps = ("🫨", "𠮷𓀀", "ꦲꦏ", "🪿𠮷"), range(2, 40)
    with Session.open(tiny_bundle) as session:
        requests = [Request("gamma", text, max_new_tokens=number) for text in prompts for number in steps]
        expected = [answer.text for answer in sorted(session.generate(requests), key=lambda answer: answer.index)]
    given = [f"--prompt={text}" for text in prompts]
    found = [answers(tiny_bundle, "--tenant=gamma", f"--max-new-tokens={number}", *given) for number in steps]
    assert [rows[place]["text"] for place in range(len(prompts)) for rows in found] == expected
    cut = [text for text in expected if "\ufffd" not in text]
    assert len(set(cut)) > 5 and any(any(ord(letter) > 127 for letter in text) for text in expected)


@needs_runner
@needs_tokenizer
def test_the_text_of_what_ends_an_answer_is_no_part_of_it(tiny_bundle: Path) -> None:
    """Also where the end token is none that the tokenizer leaves out."""
    asked = Request("gamma", "the film", max_new_tokens=10)
    with Session.open(tiny_bundle) as session:
        (whole,) = session.generate([asked])
        place = next(n for n, token in enumerate(whole.tokens) if n > 2 and session.codec.decode([token]).isalpha())
        end, before = whole.tokens[place], session.codec.decode(whole.tokens[:place])
    backbone = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))["backbone"]
    change_manifest(tiny_bundle, backbone=backbone | {"eos_token_ids": [*backbone["eos_token_ids"], end]})
    with Session.open(tiny_bundle) as session:
        (answer,) = session.generate([asked])
    assert (answer.finish_reason, answer.tokens, answer.text) == ("eos", whole.tokens[: place + 1], before)
    (made,) = answers(tiny_bundle, "--tenant=gamma", "--prompt=the film", "--max-new-tokens=10")
    assert (made["tokens"], made["text"]) == (answer.tokens, before)


@needs_runner
@needs_tokenizer
def test_a_value_may_look_like_a_flag(tiny_build: TinyBuild) -> None:
    flags = [tiny_build.bundle, "--tenant", "beta", "--max-new-tokens=4"]
    for given in (["--prompt", "-- x = 3"], ["--prompt=--note=--json"]):
        made = iapt_run(*flags, *given)
        assert made.stdout == run("generate", *flags, *given).out and made.returncode == 0, made.stderr
    refused = iapt_run(*flags, "--prompt=yes", "--json=no")
    assert refused.returncode != 0 and "--json takes no value" in refused.stderr and not refused.stdout


@needs_runner
def test_token_ids_need_no_tokenizer(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Session.open(tiny_build.bundle) as session:
        requests = [Request("beta", tokens=tokens, max_new_tokens=9) for tokens in ((5, 6, 7), (9,))]
        expected = [answer.tokens for answer in sorted(session.generate(requests), key=lambda answer: answer.index)]
    monkeypatch.setenv("IAPT_GENAI_LIBRARY", str(tmp_path / "elsewhere.so"))
    flags = [tiny_build.bundle, "--tenant=beta", "--max-new-tokens=9"]
    found = answers(*flags, "--tokens=5,6,7", "--tokens=9")
    assert [row["tokens"] for row in found] == expected
    assert iapt_run(*flags, "--tokens", "9").stdout == ",".join(map(str, expected[1])) + "\n"
    refused = iapt_run(*flags, "--prompt=text")
    assert refused.returncode == 1
    assert "a prompt is text, but libonnxruntime-genai.so does not load" in refused.stderr
    assert "give token ids (--tokens)" in refused.stderr


@needs_runner
def test_the_form_of_the_operator_is_told(tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [tiny_build.bundle, "--tenant=beta", "--tokens=5", "--max-new-tokens=1", "--verbose"]
    assert "ai.iapt::Rational as native kernel" in iapt_run(*flags).stderr
    monkeypatch.setenv("IAPT_OPS_LIBRARY", "none")
    assert "ai.iapt::Rational as function body" in iapt_run(*flags).stderr


def tenant_beside(flags: list[str]) -> list[str]:
    """A tenant, which is given once."""
    return [] if flags[0].startswith("--tenant") else ["--tenant=alpha"]


@needs_runner
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tenant=delta"], "tenant 'delta' is not in this bundle; its tenants are alpha, beta, gamma"),
        (["--target=tensorrt"], "target 'tensorrt' is not in this bundle, which has onnxruntime"),
        (["--device=cuda"], "CPUExecutionProvider; use --device cpu, or link its GPU build on a machine with"),
        (["--tokens=99999"], "request 1: token id 99999 is out of range; the vocabulary has"),
        (["--max-new-tokens=0"], "request 0: max_new_tokens is 0, expected at least 1"),
        (["--max-new-tokens=9223372036854775807"], "needs 9223372036854775807 cache entries (4 prompt, 1 "),
        (["--temperature=-1"], "temperature -1 is negative; use 0 for greedy"),
        (["--top-p=0"], "top_p 0 is out of range; expected more than 0 and at most 1"),
        (["--threads=-3"], "-3 threads; expected 0 or more"),
        (["--tokens=" + "5," * 97], "the prompt has 97 tokens; this bundle takes at most 96"),
    ],
)
def test_bad_requests(tiny_build: TinyBuild, flags: list[str], text: str) -> None:
    outcome = iapt_run(tiny_build.bundle, *tenant_beside(flags), "--tokens=5", *flags)
    assert outcome.returncode == 1 and text in outcome.stderr, outcome.stderr
    assert outcome.stdout == ""


@needs_runner
@needs_tokenizer
@pytest.mark.parametrize(
    "flags",
    [
        ["--tenant=delta"],
        ["--tenant=alpha", "--tenant=beta"],
        ["--target=tensorrt"],
        ["--device=cuda"],
        ["--max-new-tokens=0"],
        ["--max-new-tokens=160"],
        ["--top-p=1.5"],
        ["--prompt= "],
        ["--prompt=\u2003\x1c"],
        ["--prompt=" + "film " * 99],
    ],
    ids=str,
)
def test_the_same_refusals_as_python(tiny_build: TinyBuild, flags: list[str]) -> None:
    command = [tiny_build.bundle, *tenant_beside(flags), "--prompt=the film", *flags]
    wanted, made = run("generate", *command).err, iapt_run(*command).stderr
    problem = wanted.removeprefix("iapt-export: error: ").split(";")[0].strip()  # remedies differ: pip or a linker
    assert made.startswith(f"iapt_run: error: {problem}"), (wanted, made)


@needs_runner
@needs_tokenizer
@pytest.mark.parametrize("tenant", TENANTS)
def test_a_prompt_that_is_no_utf_8(tiny_build: TinyBuild, tenant: str) -> None:
    outcome = iapt_run(tiny_build.bundle, f"--tenant={tenant}", "--prompt=caf\udce9")  # the byte 0xe9
    assert outcome.returncode == 1, outcome.stderr
    assert "error: the text cannot be read as training did: it is not UTF-8" in outcome.stderr


@needs_runner
def test_a_target_without_the_graphs_of_a_cache(tiny_bundle: Path) -> None:
    from engines.serving.session import Session
    from iapt_export.contract.errors import IaptError

    (target,) = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))["targets"]
    for name in ("prefill", "decode"):
        del target["graphs"][name]
    change_manifest(tiny_bundle, targets=[target])
    with pytest.raises(IaptError, match="has no graph for that cache on device cpu; its graphs: ") as refused:
        Session.open(tiny_bundle, in_place=False)
    made = iapt_run(tiny_bundle, "--tenant=alpha", "--tokens=5", "--portable").stderr
    (problem, names), (wanted, those) = (text.strip().split("graphs: ") for text in (made, str(refused.value)))
    assert problem == f"iapt_run: error: {wanted}"
    assert sorted(names.split(", ")) == sorted(those.split(", "))


@needs_runner
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tenant=alpha"], "either --prompt or --tokens is needed"),
        (["--tenant=alpha", "--prompt"], "--prompt needs a value"),
        (["--tenant=alpha", "--prompt=x", "--seed=-1"], "--seed -1 is no number of its kind"),
        (["--tenant=alpha", "--prompt=x", "--max-new-tokens=many"], "--max-new-tokens many is no number of its kind"),
        (["--fast"], "unknown flag --fast"),
    ],
)
def test_wrong_flags(flags: list[str], text: str) -> None:
    outcome = iapt_run("bundle", *flags)
    assert outcome.returncode == 2 and text in outcome.stderr


@needs_runner
def test_a_bundle_is_needed() -> None:
    outcome = iapt_run("--prompt=x")
    assert outcome.returncode == 2 and "BUNDLE is needed" in outcome.stderr


@needs_runner
def test_help_names_every_flag() -> None:
    outcome = iapt_run("--help")
    assert outcome.returncode == 0
    shared = {"--tenant", "--prompt", "--target", "--device", "--max-new-tokens", "--temperature", "--top-p", "--seed"}
    assert all(flag in outcome.stdout for flag in {*shared, "--json", "--tokens"})


@needs_runner
def test_damage_is_found_before_anything_runs(tiny_bundle: Path) -> None:
    flags = [tiny_bundle, "--tenant=alpha", "--tokens=5", "--max-new-tokens=2"]
    weights = tiny_bundle / "weights.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    (tiny_bundle / "generator.onnx").unlink()
    outcome = iapt_run(*flags)
    assert outcome.returncode == 1
    assert "weights.data was altered: its SHA-256 differs from the manifest's" in outcome.stderr
    assert "generator.onnx is missing" in outcome.stderr
    weights.write_bytes(content[:-1])
    assert f"weights.data has {len(content) - 1} bytes, expected {len(content)}" in iapt_run(*flags).stderr


@needs_runner
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"schema_version": 1}, "schema_version is 1, this program reads 2"),
        ({"build_key": 5}, "manifest.build_key is 5, expected string"),
        ({"more": 1}, "manifest.more is not a known field"),
        ({"ranges": {}}, "manifest.ranges.batch is missing; manifest.ranges.sequence is missing"),
        ({"files": {"../x": {"sha256": "0" * 64, "size_bytes": 1}}}, 'path "../x" leaves the bundle'),
        ({"tenants": [{"name": 3}]}, "manifest.tenants[0].name is 3, expected str"),
        ({"methods": []}, 'tenant alpha is of method "iapt", which the manifest does not describe'),
    ],
)
def test_a_wrong_manifest_is_refused(tiny_bundle: Path, fields: dict[str, Any], text: str) -> None:
    change_manifest(tiny_bundle, **fields)
    outcome = iapt_run(tiny_bundle, "--tenant=alpha", "--tokens=5")
    assert outcome.returncode == 1 and text in outcome.stderr, outcome.stderr


@needs_runner
def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "holds no manifest.json; expected a bundle" in iapt_run(tmp_path, "--tenant=a", "--tokens=5").stderr
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest.json is not JSON; build the bundle again" in iapt_run(tmp_path, "--tenant=a", "--tokens=5").stderr


@needs_runner
def test_tenant_files_are_checked(tiny_bundle: Path) -> None:
    path = tiny_bundle / "tenants" / "alpha.safetensors"
    shutil.copy(tiny_bundle / "config.json", path)
    rehash(tiny_bundle)
    outcome = iapt_run(tiny_bundle, "--tenant=beta", "--tokens=5")
    assert outcome.returncode == 1 and "alpha.safetensors is not a whole safetensors file" in outcome.stderr


@needs_runner
@pytest.mark.parametrize("sampling", [[], ["--temperature=1"]])
def test_a_tenant_that_computes_nan_gives_no_tokens(tiny_bundle: Path, sampling: list[str]) -> None:
    path = tiny_bundle / "tenants" / "alpha.safetensors"
    card, tensors = read_tenant_file(path)
    tensors["up_weight"] = np.full_like(tensors["up_weight"], 3e38)
    save_file(tensors, path, card.to_metadata())
    rehash(tiny_bundle)
    outcome = iapt_run(tiny_bundle, "--tenant=alpha", "--tokens=5", *sampling)
    assert (
        outcome.returncode == 1
        and "request 0 of tenant alpha failed: its logits hold NaN or infinity" in outcome.stderr
    )
    assert iapt_run(tiny_bundle, "--tenant=gamma", "--tokens=5", *sampling).returncode == 0


@needs_runner
def test_tensorrt_says_what_it_lacks(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines are opened only where a GPU is; here the program tells which part is missing, one after the other."""
    (target,) = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))["targets"]
    change_manifest(tiny_bundle, targets=[target | {"name": "tensorrt-rtx"}])
    flags = [tiny_bundle, "--tenant=alpha", "--tokens=5"]
    monkeypatch.setenv("IAPT_TENSORRT_LIBRARY", "none")
    text = "target tensorrt-rtx needs libiapt_tensorrt_rtx.so, which is not beside this program; compile it where nvcc"
    assert text in iapt_run(*flags).stderr
    if not TENSORRT_RUNNER.is_file():
        pytest.skip("libiapt_tensorrt_rtx.so is not built; 'make cpp' builds it where nvcc and TensorRT for RTX are")
    monkeypatch.delenv("IAPT_TENSORRT_LIBRARY")
    assert "needs TensorRT's library: libtensorrt_rtx.so.1: cannot open" in iapt_run(*flags).stderr
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    assert libraries is not None and libraries.submodule_search_locations
    monkeypatch.setenv("LD_LIBRARY_PATH", libraries.submodule_search_locations[0])
    if find_driver().problem:
        text = "target tensorrt-rtx needs an NVIDIA GPU and its driver, and there is none here"
        assert text in iapt_run(*flags).stderr


@needs_fuzzer
def test_malformed_files_under_the_sanitizers(tiny_build: TinyBuild, tmp_path: Path) -> None:
    """Three seconds of damaged manifests, weights, tokenizers and templates, with the sanitizers that see misuse of
    memory and undefined behaviour; ``make fuzz`` goes on for longer.
    """
    seeds = Path(shutil.copytree(Path(__file__).parent / "corpus", tmp_path / "seeds"))
    for kind, name in {
        "manifest": "manifest.json",
        "safetensors": "tenants/alpha.safetensors",
        "tokenizer": "tokenizer.json",
        "template": "chat_template.jinja",
    }.items():
        shutil.copy(tiny_build.bundle / name, seeds / kind / "tiny")
    outcome = subprocess.run([FUZZER, "3", seeds], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    count = int(outcome.stdout.split()[0])
    assert count > 100 and "each read or refused" in outcome.stdout


def test_the_tokenizer_is_where_the_programs_look() -> None:
    """Both come from one installation, so that a runner without its tokenizer is a broken installation."""
    assert RUNNER.is_file() == TOKENIZER.is_file()
