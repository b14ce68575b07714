"""What no configuration of transformers holds is refused by its name, in one sentence, by `train` and `build` alike."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from iapt_export.cli import main
from iapt_export.contract.errors import IaptError
from tests.trainers.decoder.gguf_cases import LINEAR, YARN
from tests.trainers.decoder.gguf_files import TinyFile, write
from tests.trainers.decoder.gguf_texts import TEXT_CASES
from trainers.decoder.backbone import load_backbone
from trainers.decoder.gguf_rope import llama3_parameters

EIGHT = np.linspace(1, 8, 8, dtype=np.float32)
REFUSED = {
    "scale of logits": (TinyFile("llama", {"logit_scale": 2.0}), "the field llama.logit_scale is 2.0"),
    "experts": (TinyFile("llama", {"expert_count": 8}), "the field llama.expert_count is 8"),
    "not causal": (TinyFile("llama", {"attention.causal": False}), "the field llama.attention.causal is False"),
    "window": (TinyFile("qwen2", {"attention.sliding_window": 8}), "the field qwen2.attention.sliding_window is 8"),
    "partial rotary": (
        TinyFile("llama", {"rope.dimension_count": 8}),
        "the field llama.rope.dimension_count is 8 of 16, and llama rotates whole heads",
    ),
    "value width": (TinyFile("qwen3", {"attention.value_length": 8}), "qwen3.attention.value_length is 8, unlike"),
    "phi3 heads": (TinyFile("phi3", {"attention.key_length": 32}), "phi3.attention.key_length is 32, and phi3 has"),
    "phi3 linear": (TinyFile("phi3", LINEAR), "phi3.rope.scaling.type is 'linear', and transformers scales phi3 by"),
    "phi3 yarn": (TinyFile("phi3", YARN), "phi3.rope.scaling.type is 'yarn', and transformers scales phi3 by"),
    "unknown scaling": (TinyFile("llama", {"rope.scaling.type": "su"}), "llama.rope.scaling.type is 'su'; known are"),
    "yarn's share": (
        TinyFile("llama", {**YARN, "rope.scaling.yarn_ext_factor": 0.5}),
        "llama.rope.scaling.yarn_ext_factor is 0.5; known is 1",
    ),
    "linear attention": (
        TinyFile("llama", {**LINEAR, "rope.scaling.attn_factor": 2.0}),
        "llama.rope.scaling.attn_factor is 2.0 beside linear scaling",
    ),
    "longrope without factors": (
        TinyFile("phi3", {"rope.scaling.type": "longrope"}),
        "scales by longrope and lacks rope_factors_long.weight, rope_factors_short.weight",
    ),
    "longrope with a factor": (
        TinyFile(
            "phi3",
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
            {"rope_factors_long.weight": EIGHT, "rope_factors_short.weight": EIGHT},
        ),
        "phi3.rope.scaling.factor is 4.0 beside longrope's tensors",
    ),
    "two scalings": (
        TinyFile("llama", LINEAR, {"rope_freqs.weight": EIGHT}),
        "llama.rope.scaling.type is 'linear' beside the tensor rope_freqs.weight",
    ),
    "other rope_freqs": (
        TinyFile("llama", tensors={"rope_freqs.weight": EIGHT}),
        "rope_freqs.weight holds factors (1, 2, 3, 4, 5, 6, 7, 8 …) that Llama 3.1's scaling",
    ),
    "rope_freqs of another family": (
        TinyFile("qwen2", tensors={"rope_freqs.weight": EIGHT}),
        "holds tensors that have no place in transformers' qwen2: rope_freqs.weight",
    ),
    "normed queries": (
        TinyFile("stablelm", tensors={"blk.0.attn_q_norm.weight": np.ones((4, 16), np.float32)}),
        "no place in transformers' stablelm: blk.0.attn_q_norm.weight",
    ),
    "layers that differ": (
        TinyFile("llama", {"attention.head_count_kv": [2, 4]}),
        "the field llama.attention.head_count_kv differs from layer to layer ([2, 4]…)",
    ),
    "missing field": (TinyFile("llama", {"block_count": None}), "lacks the field llama.block_count; the file is not"),
    "missing tensor": (
        TinyFile("llama", tensors={"blk.1.ffn_up.weight": None}),
        "these are missing and would be drawn at random: model.layers.1.mlp.up_proj.weight",
    ),
    "missing bias": (
        TinyFile("qwen2", tensors={"blk.1.attn_q.bias": None}),
        "drawn at random: model.layers.1.self_attn.q_proj.bias",
    ),
    "shape": (
        TinyFile("llama", tensors={"output_norm.weight": np.ones(63, np.float32)}),
        "another shape than its configuration says: model.norm.weight [63], expected [64]",
    ),
    "heads": (
        TinyFile("llama", {"attention.head_count": 5, "rope.dimension_count": None}),
        "hidden size (64) is not a multiple of the number",
    ),
    "words": (TinyFile("llama", {"vocab_size": 319}), "has 320 words, 320 rows of token_embd.weight and a vocab_size"),
    "no embedding": (TinyFile("llama", tensors={"token_embd.weight": None}), "0 rows of token_embd.weight"),
    "qwen2moe": (TinyFile("qwen2moe"), "of the GGUF architecture 'qwen2moe'; read are llama, qwen2, qwen3, phi3"),
    "way of splitting": (
        TinyFile("llama", {"tokenizer.ggml.pre": "deepseek-llm"}),
        "splits text in the way 'deepseek-llm' (tokenizer.ggml.pre)",
    ),
    "no way of splitting": (TinyFile("llama", {"tokenizer.ggml.pre": None}), "splits text in the way 'none'"),
    "kind of words": (TinyFile("llama", {"tokenizer.ggml.model": "rwkv"}), "a tokenizer of the kind 'rwkv' with 320"),
    "no words": (TinyFile("llama", {"tokenizer.ggml.tokens": None}), "of the kind 'gpt2' with 0 words"),
    "merges of other words": (
        TinyFile("llama", {"tokenizer.ggml.merges": ["qqqq zzzz"]}),
        "has words, merges or scores of which no tokenizer can be made (",
    ),
    "end token": (
        TinyFile("llama", {"tokenizer.ggml.eos_token_id": 400}),
        "names 400 as its eos token, and has 320",
    ),
    "gemma's space": (
        replace(
            TEXT_CASES["sentencepiece gemma2 False"],
            fields={**TEXT_CASES["sentencepiece gemma2 False"].fields, "tokenizer.ggml.add_space_prefix": True},
        ),
        "tokenizer.ggml.add_space_prefix is not false, and transformers' gemma2",
    ),
    "one of several parts": (TinyFile("llama", {"split.count": 2}), "is one of 2 parts; join them with llama.cpp's"),
}
"""Name to a file and a part of what is said about it."""


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_what_is_wrong(name: str, tmp_path: Path) -> None:
    file, text = REFUSED[name]
    with pytest.raises(IaptError) as caught:
        load_backbone(str(write(tmp_path / "tiny.gguf", file)))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_train_and_build_refuse_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    write(good, TinyFile("llama"))
    write(bad, TinyFile("llama", {"logit_scale": 2.0}))
    data = tmp_path / "data.jsonl"
    examples = [{"instruction": f"film {number}", "output": "yes"} for number in range(20)]
    data.write_text("\n".join(map(json.dumps, examples)))
    train = ["train", "--method", "prompt-tuning", "--data", str(data), "--output", str(tmp_path / "adapter")]
    with pytest.raises(SystemExit):
        main([*train, "--model", str(bad)])
    trained = capsys.readouterr().err
    main([*train, "--model", str(good), "--max-steps", "1", "--quiet"])
    capsys.readouterr()
    build = ["build", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "bundle")]
    with pytest.raises(SystemExit):
        main([*build, "--model", str(bad)])
    built = capsys.readouterr().err
    for said in (trained, built):
        assert "bad.gguf: the field llama.logit_scale is 2.0" in said
        assert "Traceback" not in said
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("size", [0, 3, 40, 5000])
def test_files_cut_short_are_refused(size: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", TinyFile("llama")).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(IaptError, match="is not a whole GGUF file"):
        load_backbone(str(tmp_path / "cut.gguf"))


def test_a_file_without_chat_template_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_backbone(str(write(tmp_path / "tiny.gguf", TinyFile("llama"))))
    assert not caplog.messages
    load_backbone(str(write(tmp_path / "bare.gguf", TinyFile("llama", chat=False))))
    assert "bare.gguf has no chat template; its prompts go in as text" in caplog.text


def test_loading_shows_no_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_backbone(str(write(tmp_path / "tiny.gguf", TinyFile("llama"))))
    assert capsys.readouterr() == ("", "")


def test_llama3_factors_of_one_are_no_scaling() -> None:
    assert llama3_parameters(np.ones(8, np.float32), 10000.0, 256) == {}


def test_quantised_weights_are_the_files(tmp_path: Path) -> None:
    """Formats that llama.cpp's tools write often become gguf-py's numbers."""
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        file = TinyFile("qwen2", quantised=kind)
        weights: dict[str, Any] = load_backbone(str(write(tmp_path / "tiny.gguf", file))).model.state_dict()
        reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for theirs, ours in (("blk.1.ffn_down", "mlp.down_proj"), ("blk.1.attn_k", "self_attn.k_proj")):
            tensor = stored[f"{theirs}.weight"]
            assert tensor.tensor_type == kind
            wanted = gguf.quants.dequantize(tensor.data, kind).astype(np.float32)
            np.testing.assert_array_equal(weights[f"model.layers.1.{ours}.weight"].numpy(), wanted)
