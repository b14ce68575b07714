"""`inspect` and `doctor --model` say of models and adapters what `train` and `build` say, without any weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from iapt_export.building.plan import load_tenants
from iapt_export.contract.errors import IaptError
from iapt_export.inspection import describe
from tests.bundles import NUM_LAYERS, TENANTS, TinyBuild, run, save_tiny_adapter
from tests.families import FAMILIES, IN_PLACE, REFUSED, tiny_family
from tests.tiny import save_tiny_backbone, tiny_llama, tiny_tokenizer
from tests.trainers.adapters.test_peft_format import stock
from tests.trainers.decoder.gguf_files import TinyFile, write
from trainers.decoder.backbone import config_fingerprint, load_backbone

WORDS = {IN_PLACE: "supported", "portable": "supported by portable graphs only", REFUSED: "refused"}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone's folder without weights."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("tiny") / "model", tiny_llama(num_hidden_layers=NUM_LAYERS))
    (folder / "model.safetensors").unlink()
    return folder


def save_stock(folder: Path, kind: str = "LoraConfig", options: dict[str, Any] = LORA, **saving: Any) -> Path:
    stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), kind, options).save_pretrained(folder, **saving)
    return folder


def inspected(path: Path, *flags: str) -> dict[str, Any]:
    data, shown = run("inspect", path, *flags, "--json"), run("inspect", path, *flags)
    assert (data.code, shown.code) == (0, 0), data.err
    found: dict[str, Any] = json.loads(data.out)
    assert found["kind"] in shown.out
    return found


@pytest.mark.parametrize("name", ["llama", "bloom", "lfm2", "deepseek_v3", "gemma2"])
def test_the_verdict_on_a_model(name: str, tmp_path: Path) -> None:
    expected, *_ = FAMILIES[name]
    made = tiny_family(name)
    made.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = inspected(tmp_path)
    assert (found["kind"], found["verdict"]) == ("model", WORDS[expected])
    outcome = run("doctor", f"--model={tmp_path}", "--json")
    doctor = json.loads(outcome.out)[-1]
    assert outcome.code == (expected == REFUSED)
    assert (doctor["name"], doctor["kind"]) == (f"serve {tmp_path}", "ability")
    assert (doctor["status"] == "missing") == (expected == REFUSED) and (doctor["status"] == "ok") == (
        expected == IN_PLACE
    )
    if expected == REFUSED:
        with pytest.raises(IaptError) as caught:
            load_backbone(str(tmp_path))
        assert found["reason"] == doctor["detail"] == str(caught.value)
    else:
        assert found["parameters"] == sum(parameter.numel() for parameter in made.parameters())
        assert (found["model_type"], found["layers"]) == (made.config.model_type, made.config.num_hidden_layers)
        assert all(text in doctor["detail"] for text in found.get("restrictions", []))


def test_models_of_other_kinds_of_files(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", TinyFile("llama"))
    for place in (path, tmp_path):
        assert (inspected(place)["verdict"], inspected(place)["width"]) == ("supported", 64)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:100])
    found = inspected(broken)
    assert found["verdict"] == "refused" and "is not a whole GGUF file" in found["reason"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for text in ("{", "[]", "{}", '{"model_type": "none such"}', '{"model_type": "llama", "num_attention_heads": 0}'):
        (folder / "config.json").write_text(text, "utf-8")
        assert inspected(folder)["verdict"] == "refused", text


def test_a_model_whose_text_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", TinyFile("llama", {"tokenizer.ggml.pre": "deepseek-llm"}))
    assert "splits text in the way 'deepseek-llm'" in inspected(path)["reason"]
    tiny_family("llama").config.save_pretrained(tmp_path / "bare")
    found = inspected(tmp_path / "bare")
    assert found["verdict"] == "refused" and "tokenizer" in found["reason"]


def test_an_adapter_of_stock_peft(model: Path, tmp_path: Path) -> None:
    lora = save_stock(tmp_path / "lora")
    found = inspected(lora)
    assert (found["kind"], found["peft_type"], found["r"]) == ("adapter of stock PEFT", "LORA", 2)
    assert sorted(found["target_modules"]) == ["down_proj", "q_proj"]
    assert found["build"].startswith("not checked") and "--model" in found["build"]
    found = inspected(lora, f"--model={model}")["build"]
    assert found.startswith("supported as LORA; it was written by stock PEFT, which does not say how prompts were fed")
    assert f"give --adapter {lora},format=chat if training used it, or {lora},format=plain if" in found
    no_chat = save_tiny_backbone(tmp_path / "plain", tiny_llama(num_hidden_layers=NUM_LAYERS), chat=False)
    assert inspected(lora, f"--model={no_chat}")["build"] == "supported as LORA"
    tiny_tokenizer().save_pretrained(lora)  # as TRL does, with the chat template that it trained with
    found = inspected(lora, f"--model={no_chat}")["build"]
    assert found.startswith(
        "supported as LORA; it was saved with a chat template, which this backbone's tokenizer lacks"
    )
    prompt = save_stock(tmp_path / "prompt", "PromptTuningConfig", {"num_virtual_tokens": 4})
    found = inspected(prompt, f"--model={model}")
    assert (found["build"].partition(";")[0], found["num_virtual_tokens"]) == ("supported as PROMPT_TUNING", 4)


def test_an_adapter_of_stock_peft_that_names_another_backbone(tmp_path: Path, caplog: Any) -> None:
    """PEFT records a name alone, and weights of one shape are many."""
    model = save_tiny_backbone(tmp_path / "Tiny-Instruct", tiny_llama(num_hidden_layers=NUM_LAYERS), chat=False)
    backbone = load_backbone(str(model))
    for name, doubtful in (("someone/tiny-instruct", False), ("someone/Tiny", True), (None, False)):
        folder = save_stock(tmp_path / f"of {name}".replace("/", " "))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": name}), "utf-8")
        words = f"{folder} was trained for {name}, and {model} is given: their sizes agree, and that is all"
        assert (words in inspected(folder, f"--model={model}")["build"]) == doubtful
        caplog.clear()
        load_tenants([f"a={folder}"], backbone)
        assert (words in caplog.text) == doubtful


def test_an_adapter_of_stock_peft_that_build_refuses(model: Path, tmp_path: Path) -> None:
    for name, changes, text in (
        ("biased", {"lora_bias": True}, "lora_bias=True is not supported"),
        ("other", {"peft_type": "IA3"}, "PEFT's method 'IA3' is not supported; use one of PROMPT_TUNING"),
    ):
        folder = save_stock(tmp_path / name)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
        said = inspected(folder, f"--model={model}")["build"]
        assert said.startswith("refused: ") and text in said
        assert (name == "other") == inspected(folder)["build"].startswith("refused: ")
    narrow = save_tiny_backbone(tmp_path / "narrow", tiny_llama(num_hidden_layers=NUM_LAYERS, intermediate_size=64))
    assert inspected(tmp_path / "biased", f"--model={narrow}")["build"].startswith("refused: ")
    (narrow / "config.json").write_text("{}", "utf-8")
    assert inspected(tmp_path / "biased", f"--model={narrow}")["build"].startswith("refused: ")


def test_a_bundle_is_no_model(tiny_build: TinyBuild) -> None:
    """It carries its backbone's configuration."""
    outcome = run("doctor", f"--model={tiny_build.bundle}")
    assert outcome.code == 1 and "is a bundle, which holds no weights to train or build with" in outcome.err


def test_an_adapter_of_ours_and_a_backbone(model: Path, tmp_path: Path) -> None:
    fingerprint = config_fingerprint(tiny_llama(num_hidden_layers=NUM_LAYERS).config)
    mine, other = (save_tiny_adapter(tmp_path / text, 0, text) for text in (fingerprint, "other"))
    assert "build" not in describe(mine)
    assert describe(mine, str(model))["build"] == "supported as IAPT"
    chat = save_tiny_adapter(tmp_path / "chat", 1, fingerprint)
    no_chat = save_tiny_backbone(tmp_path / "no-chat" / "model", tiny_llama(num_hidden_layers=NUM_LAYERS), chat=False)
    assert describe(chat, str(model))["build"] == "supported as IAPT"
    assert describe(chat, str(no_chat))["build"].startswith("refused: prompt_format=chat needs a tokenizer with a chat")
    (mine / "examples.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b\u2028c"}\n', "utf-8")
    assert describe(mine)["example_prompts"].startswith("2 in examples.jsonl, which build compares")
    (mine / "examples.jsonl").unlink()
    assert describe(mine)["example_prompts"] == "none in examples.jsonl: build compares general prompts"
    assert "fingerprint is other in the adapter" in describe(other, str(model))["build"]
    refused = run("inspect", model, f"--model={model}")
    assert refused.code == 1 and "--model is for an adapter directory" in refused.err


def test_a_bundle_in_twenty_lines_or_whole(tiny_build: TinyBuild) -> None:
    short, whole = run("inspect", tiny_build.bundle), run("inspect", tiny_build.bundle, "--all")
    assert (short.code, whole.code) == (0, 0)
    assert len(short.out.splitlines()) <= 20 and "--all lists them" in short.out and "serve.onnx" not in short.out
    assert "serve.onnx" in whole.out and "--all" not in whole.out
    assert all(name in short.out for name in ("verdict", *TENANTS, "targets", "ranges"))


def test_a_bundle_says_whether_its_verdict_is_of_these_files(tiny_build: TinyBuild, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_build.bundle, bundle)
    assert inspected(bundle)["intact"] == "yes, every file has the manifest's hash"
    with (bundle / "tenants" / "beta.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    found = inspected(bundle)
    assert found["verdict"] == "pass" and found["intact"].startswith("no: ")
    assert "tenants/beta.safetensors" in found["intact"] and "alpha" not in found["intact"]


def test_a_tenants_file(tiny_build: TinyBuild, tmp_path: Path) -> None:
    (path, *_) = sorted((tiny_build.bundle / "tenants").glob("*.safetensors"))
    found = inspected(path)
    assert (found["kind"], found["name"], found["form"]) == ("tenant's file", TENANTS[0], "IAPT")
    assert found["tensors"] and all(isinstance(size, int) for shape in found["tensors"].values() for size in shape)
    for name, content, text in (
        (
            "whole.safetensors",
            (tiny_build.adapters["alpha"] / "adapter_model.safetensors").read_bytes(),
            "no tenant card",
        ),
        ("cut.safetensors", path.read_bytes()[:100], "is no whole safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        refused = run("inspect", tmp_path / name)
        assert refused.code == 1 and text in refused.err


def test_adapters_of_several_names_in_one_folder(model: Path, tmp_path: Path) -> None:
    """As PEFT's save_pretrained leaves them where an adapter is not called "default"."""
    made = stock(lambda: tiny_llama(num_hidden_layers=NUM_LAYERS), "LoraConfig", LORA)
    for name in ("tone", "topic"):
        made.add_adapter(name, made.peft_config["default"])
    folder = tmp_path / "all"
    made.save_pretrained(folder, selected_adapters=["tone", "topic"])
    assert not (folder / "adapter_config.json").exists()
    wanted = f"{folder} is no adapter but holds 2 in folders of their own; give --adapter tone={folder / 'tone'}, "
    wanted += f"--adapter topic={folder / 'topic'}"
    full = save_tiny_backbone(tmp_path / "model", tiny_llama(num_hidden_layers=NUM_LAYERS))
    for argv in (
        ("inspect", folder),
        ("build", f"--model={full}", f"--adapter={folder}", f"--output={tmp_path / 'bundle'}"),
    ):
        outcome = run(*argv)
        assert outcome.code == 1 and wanted in outcome.err and outcome.err.count("\n") <= 3, outcome.err
    assert inspected(folder / "tone", f"--model={model}")["build"].startswith("supported as LORA; it was written by")
    made.save_pretrained(folder)
    inside = ", ".join(f"--adapter {folder / name}" for name in ("tone", "topic"))
    assert inspected(folder)["also_inside"] == inside and "also_inside" not in inspected(folder / "tone")
