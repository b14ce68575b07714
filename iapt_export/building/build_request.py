"""What a build is asked for. Light to import: the command line is made from it, and its help texts are below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iapt_export.contract.settings import choice_problems, raise_problems, range_problems

Device = Literal["cpu", "cuda"]
PeftFormat = Literal["plain", "chat"]
Rational = Literal["function", "plugin"]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A bundle that is wanted: of which backbone and adapters, for which targets, within which ranges.

    Raises:
        IaptError: a field has a value that no build can have; all problems are listed together. What depends on
            the backbone, the adapters or this machine is checked by `iapt_export.build`.
    """

    model: str
    """Hugging Face id, local folder, or GGUF file or folder."""
    adapters: Sequence[str | Path]
    """Adapter directories, one for each tenant; the tenant is called NAME (``NAME=DIR``), or as its folder is."""
    output: str | Path
    """Bundle to write."""
    targets: Sequence[str] = ()
    """onnxruntime, tensorrt-rtx or tensorrt, as ``NAME`` or ``NAME:DTYPE``; none at all means onnxruntime."""
    dtype: str | None = None
    """fp32, fp16 or bf16, for targets that name none."""
    opset: int | None = None
    """20 or 23; None takes 23."""
    compute_capability: str | None = None
    """GPU generation to build for, such as 8.9; None builds portable engines."""
    rational: Rational = "function"
    """ai.iapt::Rational in TensorRT engines: standard operators, or the plugin that 'make cpp' builds."""
    batch: str = "1:4:8"
    """Rows of one batch."""
    sequence: str = "1:64:512"
    """Instruction tokens of a row."""
    past: str = "1:256:1024"
    """Cache entries of a row: prompts, instruction, answer."""
    tenants: str = "1:4:64"
    """Tenants installed side by side."""
    peft_prompt_format: PeftFormat = "plain"
    """How prompts are fed to adapters of stock PEFT, which do not say: as they are, or in the chat template."""
    merge_lora: bool = False
    """Add the one LoRA adapter to the backbone's weights: no cost, but no other tenant."""
    fold_embeddings: bool = False
    """Ship ADePT's token offsets as one embedding table a tenant: less arithmetic, more memory."""
    seed: int = 0
    """Order in which prompts are mixed in the comparison."""
    new_tokens: int = 64
    """Greedy tokens for each prompt in the comparison."""
    device: Device = "cpu"
    """Where ONNX Runtime runs in the comparison."""
    prove: bool = True
    """Compare with PyTorch before the bundle is published. Without it the manifest's verdict is ``not run``: for
    measurements alone."""
    cache: str | Path | None = None
    """Where finished stages are kept; None takes $IAPT_EXPORT_CACHE or the user's cache."""
    revision: str | None = None
    """Commit or branch of the model on the hub."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""

    def __post_init__(self) -> None:
        problems = choice_problems(self) + range_problems(self, seed=(0, 2**32 - 1), new_tokens=(1, 2**20))
        for name in ("adapters", "targets"):
            if isinstance(getattr(self, name), str | Path):
                problems.append(f"{name}={str(getattr(self, name))!r} is one text; expected a list of them")
        raise_problems("build request", problems)
