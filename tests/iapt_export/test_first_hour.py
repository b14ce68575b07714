"""A newcomer's mistakes on the command line: one sentence that says what to try, an exit code, and no stack trace."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.bundles import TinyBuild, run

BUNDLE = "expected a bundle written by 'iapt-export build', found "
ADAPTER = "expected an adapter directory written by a trainer, found "
ASK = ["--tenant=alpha", "--prompt=x"]
TRAIN = ["--data=reviews.jsonl", "--output=out"]
BUILD = ["build", "--model=model", "--output=new"]


@pytest.fixture
def desk(tiny_build: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, an adapter, a bundle, data, and what is none of them."""
    for name, place in {"model": tiny_build.model, "alpha": tiny_build.adapters["alpha"]}.items():
        shutil.copytree(place, tmp_path / name)
    (tmp_path / "bundle").symlink_to(tiny_build.bundle)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
    (tmp_path / "empty").mkdir()
    records = [{"instruction": "positive?", "input": f"film {n}", "output": ("yes", "no")[n % 2]} for n in range(20)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    (tmp_path / "reviews.csv").write_text("text,label\na quiet joy,positive\n", "utf-8")
    (tmp_path / "alpaca.json").write_text(json.dumps(records, indent=2), "utf-8")
    (tmp_path / "chats.jsonl").write_text('{"conversations": [{"from": "human", "value": "hi"}]}', "utf-8")
    (tmp_path / "keys.json").write_text('{"KEY": ["alpah", "beta"]}', "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generate", "reviews.csv", *ASK], f"{BUNDLE}a file"),
        (["generate", "bundle/manifest.json", *ASK], f"{BUNDLE}a file of a bundle; name the folder, bundle"),
        (["generate", "nowhere", *ASK], f"{BUNDLE}nothing there"),
        (["generate", "alpha", *ASK], f"{BUNDLE}an adapter, which --adapter of 'iapt-export build' takes"),
        (["serve", "model"], f"{BUNDLE}a model, which --model takes"),
        (["bench", "empty"], f"{BUNDLE}a folder that is nothing of ours"),
        (["generate", "bundle", *ASK, f"--max-new-tokens={10**20}"], "expected at most 2147483648, a whole number"),
        (["train", "--model=lora", *TRAIN], "found an adapter, which --adapter of 'iapt-export build' takes"),
        (["train", "--model=bundle", *TRAIN], "or a GGUF file, found a bundle"),
        (["train", "--model=some/model", *TRAIN], "Expected a Hugging Face id and a network, a folder with"),
        (["train", "--model=model", "--data=empty", "--output=out"], "the data file empty is no file; expected JSONL"),
        (["train", "--model=model", "--data=nowhere", "--output=out"], "the data file nowhere does not exist"),
        (
            ["train", "--model=model", "--data=reviews.csv", "--output=out"],
            "\ntry: iapt-export data convert reviews.csv --format csv --output reviews.jsonl",
        ),
        (["train", "--model=model", "--data=alpaca.json", "--output=out"], "--format alpaca --output alpaca.jsonl"),
        (["train", "--model=model", "--data=chats.jsonl", "--output=out"], "--format sharegpt --output chats.jsonl"),
        (["train", "--model=model", *TRAIN, "--report-to=wandbb"], "report_to is 'wandbb', expected none, all or one"),
        (["train", "--config=empty"], "the settings file empty is no file"),
        ([*BUILD, "--adapter=nowhere"], f"{ADAPTER}nothing there"),
        ([*BUILD, "--adapter=bundle"], f"{ADAPTER}a bundle"),
        ([*BUILD, "--adapter=model"], f"{ADAPTER}a model, which --model takes"),
        (
            [*BUILD, "--adapter=alpha/adapter_model.safetensors"],
            f"{ADAPTER}a file of an adapter; name the folder, alpha",
        ),
        ([*BUILD, "--adapter=alpha", "--adapter=alpha=lora"], "two adapters are called 'alpha'; tell them apart with"),
        ([*BUILD, "--adapter=x="], "--adapter x=: the folder is empty; expected DIR or NAME=DIR"),
        ([*BUILD, "--adapter=lora, format=chat"], "' format=chat' is no setting; expected DIR,format=chat (plain, "),
        ([*BUILD, "--adapter=lora,fromat=chat"], "'fromat=chat' is no setting"),
        ([*BUILD, "--adapter=alpha,lora"], "'lora' is no setting; expected DIR,format=chat (plain, newline) or DIR,"),
        ([*BUILD, "--adapter=alpha", "--cache=reviews.csv"], "a file stands where a folder belongs; give another path"),
        (
            [*BUILD, "--adapter=alpha"],
            "--past 1024 is more than the backbone's 256 positions less one; give --past 255",
        ),
        (["tenant", "alpha", "--bundle=bundle", "--output=t.bin"], "t.bin must end in .safetensors"),
        (["inspect", "some/model"], "some/model does not exist; expected an adapter directory"),
        (["inspect", "some/model"], "(doctor --model some/model asks the model hub)"),
        (["data", "convert", "empty", "--format=csv", "--output=o.jsonl"], "the file empty is no file"),
        (["serve", "bundle", "--port=99999"], "port 99999 is no port; expected 1 to 65535, or 0 for a free one"),
        (["serve", "bundle", "--port=-1"], "port -1 is no port"),
        (["serve", "bundle", "--port=0", "--host=999.1.1.1"], "nothing can listen on 999.1.1.1:0"),
        (
            ["serve", "bundle", "--port=0", "--keys=keys.json"],
            "keys are for tenants alpah; this server has alpha, beta, gamma",
        ),
    ],
)
def test_what_is_not_what_was_meant(desk: Path, argv: list[str], text: str) -> None:
    before = sorted(desk.iterdir())
    outcome = run(*argv)
    assert (outcome.code, outcome.out) == (1, ""), outcome.err
    assert text in outcome.err and "Traceback" not in outcome.err
    assert "loading" not in outcome.err or "--past" in text, "refused before the backbone is read"
    assert sorted(desk.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generate", "bundle", "--tenant=alpha", "--promt=x"], "Unknown option: --promt. Did you mean --prompt? (see"),
        (["generate", "bundle", "--tenant", "alpha", "--promt", "x"], "error: Unknown option: --promt. Did you mean"),
        (["generate", "", *ASK], "BUNDLE needs a value"),
        (["generate", "bundle", "--tenant=alpha", "--messages="], "--messages needs a value"),
        (["train", "--model", "", *TRAIN], "--model needs a value"),
        ([*BUILD, "--adapter", ""], "--adapter needs a value"),
        (["validate", "bundle", "--new-tokens=0"], 'Invalid value "0" for --new-tokens. Must be > 0.'),
        (["cache", "--cache=nowhere"], '"nowhere" does not exist'),
        (["cache", "--cache=reviews.csv"], '"reviews.csv" is a file'),
    ],
)
def test_what_was_mistyped(desk: Path, argv: list[str], text: str) -> None:
    outcome = run(*argv)
    assert (outcome.code, outcome.out) == (2, "") and text in outcome.err, outcome.err


def test_a_text_may_be_empty_where_that_means_something(desk: Path) -> None:
    outcome = run("train", "--model=model", *TRAIN, "--eval-file=", "--data-note=", "--max-steps=-1")
    assert outcome.code == 1 and "max_steps=-1 is not an integer of at least 0" in outcome.err


def test_a_port_that_is_taken(desk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run("serve", "bundle", f"--port={port}")
    assert outcome.code == 1
    assert f"nothing can listen on 127.0.0.1:{port} (Address already in use); give --port another" in outcome.err
