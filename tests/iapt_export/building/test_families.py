"""Every supported family through the whole way: built, proven, and answering as stock transformers and PEFT do."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from engines.serving.session import Request, Session, Token
from iapt_export import BuildRequest, build
from iapt_export.contract.manifest import BundleManifest
from tests.bundles import RANGES, random_method
from tests.families import FAMILIES, IN_PLACE, REFUSED, tiny_family
from tests.tiny import save_tiny_backbone
from tests.trainers.adapters.test_peft_format import stock, stock_greedy
from trainers.adapters.adapter import AdapterConfig
from trainers.adapters.directory import save_adapter
from trainers.decoder.backbone import config_fingerprint, load_backbone
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import IAPTConfig, LoRAConfig, PrefixTuningConfig
from validation.judging.compare import Settings
from validation.validate import validate_bundle

SUPPORTED = [name for name, (expected, *_) in FAMILIES.items() if expected != REFUSED]
NEW_TOKENS = 8
LIMIT = 1e-3
"""Of natural logarithms of probabilities; fp32 sums of tiny models stay far below, and adapters change more."""
PROMPTS = (tuple(range(5, 25)), (40, 77, 12))
"""Longer than the windows of those that have one, and shorter."""
SHORT_ROWS = {"sequence": "1:16:24", "past": "5:24:31"}
"""Within the 32 positions that longrope's short factors are for."""
OURS = ("iapt", "prefix", "lora")
TENANTS = ("", "stock", *OURS)
"""The backbone alone, and the bundle's four tenants."""


def method_for(name: str, sizes: Sizes) -> Any:
    """A method's configuration; families call the linears of their attention by many names."""
    if name == "lora":
        leaves = list(dict.fromkeys(linear.rpartition(".")[2] for linear in sizes.linears))
        return LoRAConfig(
            rank=2, target_modules=tuple(leaf for leaf in ("q_proj", "v_proj") if leaf in leaves) or (leaves[0],)
        )
    return IAPTConfig(bottleneck=8) if name == "iapt" else PrefixTuningConfig(prompt_length=3)


def save_ours(folder: Path, family: str, seed: int) -> None:
    """An adapter of a random method, in the format that the trainer writes."""
    model = tiny_family(family)
    sizes = sizes_of(model)
    method = method_for(folder.name, sizes)
    module = random_method(seed, method, sizes)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in ("numerator", "denominator"):
                parameter.mul_(0.2)  # families scale what they embed: enough to matter, not enough to saturate
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        backbone_fingerprint=config_fingerprint(model.config),
        method=method,
        **dataclasses.asdict(sizes),
    )
    save_adapter(folder, config, dict(module.state_dict()))


@dataclasses.dataclass
class Words:
    """Greedy tokens, and the logarithm of the probability of each: tiny models that say little tell more by these."""

    tokens: list[int]
    log_probabilities: np.ndarray

    def distance(self, other: Words) -> float:
        return float(np.abs(self.log_probabilities - other.log_probabilities).max())


def generated(model: Any, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens of transformers' ``generate``, and their logits ``[T, V]``."""
    ids = torch.tensor([list(prompt)])
    fed = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1, "eos_token_id": None, "do_sample": False}
    wanted = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
    answer = model.generate(input_ids=ids, **fed, **wanted)
    return answer.sequences[0, -NEW_TOKENS:].tolist(), torch.cat(answer.logits)


def stock_words(model: Any, **options: Any) -> list[Words]:
    """What a stock model answers to each prompt, alone: transformers' by ``generate``, PEFT's by `stock_greedy`."""
    made = []
    for prompt in PROMPTS:
        if isinstance(model, PeftModel):
            tokens, logits = stock_greedy(model, prompt, NEW_TOKENS, **options)
        else:
            tokens, logits = generated(model, prompt)
        made.append(Words(tokens, logits.double().log_softmax(-1)[range(NEW_TOKENS), tokens].numpy()))
    return made


def served_words(bundle: Path, tenants: Sequence[str], **checks: bool) -> dict[str, list[Words]]:
    """What each tenant of a bundle answers to each prompt, all in one session's batches; ``checks`` of its opening."""
    requests = [
        Request(tenant, tokens=prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
        for tenant in tenants
        for prompt in PROMPTS
    ]
    said: list[list[Token]] = [[] for _ in requests]
    with Session.open(bundle, **checks) as session:
        for token in session.stream(requests):
            said[token.index].append(token)
    words = [Words([t.token for t in answer], np.array([t.logprob for t in answer])) for answer in said]
    return {tenant: words[2 * place : 2 * place + 2] for place, tenant in enumerate(tenants)}


def stock_prompt(family: str) -> Any:
    """A family in stock PEFT, with a prompt."""
    return stock(lambda: tiny_family(family), "PromptTuningConfig", {"num_virtual_tokens": 4})


def built(family: str, folder: Path, *targets: str, prove: bool = True) -> Path:
    """A bundle of four tenants that the proof accepts: a prompt that stock PEFT saved, IAPT, a prefix, and LoRA.

    A second one, for other targets, takes its place. Without ``prove`` nothing was compared yet.
    """
    adapters = [folder / name for name in TENANTS[1:]]
    if not (folder / "model").is_dir():
        save_tiny_backbone(folder / "model", tiny_family(family))
        stock_prompt(family).save_pretrained(folder / "stock")
        for seed, name in enumerate(OURS):
            save_ours(folder / name, family, seed)
    places = {"model": str(folder / "model"), "output": folder / "out", "cache": folder / "cache"}
    fields = {"new_tokens": NEW_TOKENS, "peft_prompt_format": "plain"}
    build(BuildRequest(**places, **RANGES | SHORT_ROWS, **fields, adapters=adapters, targets=targets, prove=prove))
    assert not prove or BundleManifest.load(folder / "out").parity.verdict == "pass"
    return folder / "out"


def report_in(bundle: Path) -> dict[str, Any]:
    """The report of a bundle that was proven when it was built."""
    return dict(json.loads((bundle / "report.json").read_text(encoding="utf-8")))


def report_on(bundle: Path) -> dict[str, Any]:
    """The report of a bundle that was not, whatever its verdict is."""
    backbone = load_backbone(str(bundle.parent / "model"))
    settings = Settings(new_tokens=NEW_TOKENS, peft_check=False)
    return validate_bundle(bundle, BundleManifest.load(bundle), backbone, settings).to_dict()


def result_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What a report says of a target, or of PEFT."""
    (result,) = [target for target in report["targets"] if target["name"] == name]
    return dict(result)


def served_apart(bundle: Path, **checks: bool) -> dict[str, list[Words]]:
    """Every tenant's answers and the backbone's, which adapters must change."""
    served = served_words(bundle, TENANTS, **checks)
    for one, other in itertools.combinations(TENANTS, 2):
        # a prompt is out of sight behind a long instruction where windows are short
        apart = max(ours.distance(theirs) for ours, theirs in zip(served[one], served[other], strict=True))
        assert apart > 10 * LIMIT, f"{one!r} and {other!r}: adapters matter"
    return served


def served_and_compared(family: str, folder: Path) -> float:
    """Build, prove and serve a family; the largest difference of a log-probability to stock transformers and PEFT."""
    bundle = built(family, folder)
    assert result_of(report_in(bundle), "PEFT's own answer")["status"] == "pass"
    assert ("serve" in BundleManifest.load(bundle).target().graphs) == (FAMILIES[family][0] == IN_PLACE)
    served = served_apart(bundle)
    distances = []
    for tenant, stock_model in (("", tiny_family(family)), ("stock", stock_prompt(family))):
        for ours, wanted in zip(served[tenant], stock_words(stock_model), strict=True):
            assert ours.tokens == wanted.tokens, tenant
            distances.append(ours.distance(wanted))
    return max(distances)


def rounded_error(bundle: Path, report: dict[str, Any], dtype: str) -> tuple[float, bool]:
    """Serve a bundle whose weights are in ``int8`` or ``int4``, and read what was measured.

    Returns:
        The largest error of a logit, relative to the largest, of graphs that round no activations against PyTorch with
        weights that went through the same quantiser, where greedy tokens must be the same; and whether the target as it
        is served, with activations rounded too, is near enough to fp32 to be shipped. That is chance in a model of
        random weights.
    """
    exact = result_of(report, f"onnxruntime with {dtype} weights, otherwise")
    assert exact["status"] == "pass"
    assert [check["passed"] for check in exact["checks"] if check["stage"] == "greedy tokens"] == [True]
    served_apart(bundle, allow_unproven=True)
    error = max(check["measured"]["relative"] for check in exact["checks"] if check["stage"].endswith("logits"))
    return error, result_of(report, "onnxruntime")["status"] == "pass"


def engines_of(bundle: Path, report: dict[str, Any]) -> list[str]:
    """A bundle's TensorRT for RTX engines, whose interface the proof checked, and more where there is a GPU."""
    engines = result_of(report, "tensorrt-rtx")
    assert engines["checks"] and all(check["passed"] for check in engines["checks"])
    return sorted(path.stem for path in (bundle / "engines").rglob("*.engine"))


@pytest.mark.thorough
def test_a_mask_that_is_given_by_name_is_read_in_place(tmp_path: Path) -> None:
    assert served_and_compared("afmoe", tmp_path) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_is_served_as_stock_libraries_run_it(family: str, tmp_path: Path) -> None:
    """The backbone's tokens are those of ``generate``, a soft prompt's those of PEFT, and the proof holds for all."""
    assert served_and_compared(family, tmp_path) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "gemma2", "gpt_oss", "bloom", "deepseek_v2"])
def test_a_family_on_other_targets(family: str, tmp_path: Path) -> None:
    """Weights in 4 bits, and engines for NVIDIA GPUs; ``python -m benchmarks.families`` tries all families."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which builds engines without a GPU")
    in_place = FAMILIES[family][0] == IN_PLACE
    bundle = built(family, tmp_path, f"onnxruntime:{'int4' if in_place else 'fp32'}", "tensorrt-rtx:fp16")
    report = report_in(bundle)
    assert engines_of(bundle, report) == (["serve_decode", "serve_prefill"] if in_place else ["decode", "prefill"])
    if in_place:
        error, ships = rounded_error(bundle, report, "int4")
        assert error < LIMIT and ships
