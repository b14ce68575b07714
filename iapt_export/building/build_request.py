"""What a build is asked for: the flags of ``iapt-export build`` are these fields, the texts below them their help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from iapt_export.contract.errors import shown
from iapt_export.contract.low_bits import AUTO, rounding_problems
from iapt_export.contract.prompt_format import PromptFormat
from iapt_export.contract.settings import choice_problems, raise_problems, range_problems, type_problems

Device = Literal["cpu", "cuda"]
Depth = Literal["quick", "standard", "full"]
Rational = Literal["function", "plugin"]
MAX_DRAFTS = 15
"""Each drafted token is one more attention in every layer of the graph."""
_TARGETS = Parameter(group=Group("Targets", sort_key=1))
_RANGES = Parameter(
    group=Group("Ranges that graphs and engines are built for: MAX, or MIN:OPT:MAX", sort_key=2), metavar="RANGE"
)
_METHODS = Parameter(group=Group("Methods", sort_key=3))
_COMPARISON = Parameter(group=Group("Comparison with PyTorch", sort_key=4))


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A bundle that is wanted: of which backbone and adapters, for which targets, within which ranges.

    Raises:
        IaptError: a field has a value that no build can have; all problems are listed together. What depends on
            the backbone, the adapters or this machine is checked by `iapt_export.build`.
    """

    model: Annotated[str, Parameter(alias="-m", metavar="M")]
    """Hugging Face id, local folder, or GGUF file or folder."""
    output: Annotated[str | Path, Parameter(alias="-o", metavar="BUNDLE")]
    """Bundle to write."""
    adapters: Annotated[Sequence[str | Path], Parameter(("--adapter", "-a"), metavar="[NAME=]DIR")] = ()
    """Adapter directory, once a tenant, called NAME or as the folder is; PEFT's also DIR,format=chat or DIR,task=0;
    without any, the backbone alone is served."""
    targets: Annotated[Sequence[str], _TARGETS, Parameter(("--target", "-t"), metavar="T[:DTYPE]")] = ()
    """onnxruntime or tensorrt-rtx (also with :int8 or :int4 weights, tensorrt-rtx with :fp8 or :nvfp4 too), tensorrt;
    once for each; without, onnxruntime."""
    dtype: Annotated[str | None, _TARGETS, Parameter(metavar="DTYPE")] = None
    """fp32, fp16 or bf16, for targets that name none."""
    quantise: Annotated[str, _TARGETS, Parameter(metavar="KEY=N,...|auto")] = ""
    """How int8, int4, fp8 and nvfp4 store the weights: block=32, 64 or 128 values share a scale (not nvfp4); bits of
    the embedding and the head, head=8 or 4; of products with more inputs than outputs, narrow=8 or 4; of the KV cache,
    cache=32 or 8 (onnxruntime); without it, 32, 8, 8 and 32. auto measures a few of onnxruntime's, and takes the
    fastest that answers the tenants' example prompts as these do."""
    opset: Annotated[int | None, _TARGETS, Parameter(metavar="N")] = None
    """20 or 23; without it, 23."""
    compute_capability: Annotated[str | None, _TARGETS, Parameter(metavar="X.Y")] = None
    """GPU generation to build for, such as 8.9; without it, engines are portable."""
    rational: Annotated[Rational, _TARGETS] = "function"
    """ai.iapt::Rational in TensorRT engines: standard operators, or the plugin that 'make cpp' builds."""
    batch: Annotated[str, _RANGES] = "1:4:8"
    """Rows of one batch."""
    sequence: Annotated[str, _RANGES] = "1:64:512"
    """Instruction tokens of a row."""
    past: Annotated[str, _RANGES] = "1:256:1024"
    """Cache entries of a row: prompts, instruction, answer."""
    tenants: Annotated[str, _RANGES] = "1:4:64"
    """Tenants installed side by side."""
    drafts: Annotated[int, _TARGETS, Parameter(metavar="K")] = 0
    """For onnxruntime: let sessions verify up to K drafted tokens of a row in one step (serve --drafts); 3 is good."""
    peft_prompt_format: Annotated[PromptFormat | None, _METHODS] = None
    """How prompts are fed to adapters of stock PEFT, which do not say: as they are (plain), with a line break behind
    (newline), or in the chat template; has to be given where the tokenizer has one."""
    merge_lora: Annotated[bool, _METHODS] = False
    """Add the one LoRA adapter to the backbone's weights: no cost, but no other tenant."""
    fold_embeddings: Annotated[bool, _METHODS] = False
    """Ship ADePT's token offsets as one embedding table a tenant: less arithmetic, more memory."""
    max_lora_rank: Annotated[int | None, _METHODS, Parameter(metavar="N")] = None
    """Highest rank of a LoRA tenant, also of those that come later; without it, the highest of those given."""
    seed: Annotated[int, _COMPARISON] = 0
    """Order in which prompts are mixed in the comparison."""
    new_tokens: Annotated[int, _COMPARISON] = 64
    """Greedy tokens for each prompt in the comparison."""
    depth: Annotated[Depth | None, _COMPARISON] = None
    """How much is compared: a few prompts and tokens (quick), all prompts (standard), or the longest cases as well
    (full); without it, standard, and quick for backbones of more than two billion parameters."""
    device: Annotated[Device, _COMPARISON] = "cpu"
    """Where ONNX Runtime runs in the comparison; for cuda the bundle also gets the graphs that fp32 needs there."""
    no_peft_check: Annotated[bool, _COMPARISON] = False
    """Leave out the comparison with PEFT itself, which is made where it is installed and has the tenant's method."""
    prove: Annotated[bool, Parameter(parse=False)] = True
    """Compare with PyTorch before the bundle is published. Without it the manifest's verdict is ``not run``: for
    measurements alone."""
    sign: Annotated[str | Path | None, Parameter(metavar="KEY.pem")] = None
    """Sign the manifest with this private ed25519 key; whoever runs the bundle can ask for that with --trust."""
    cache: Annotated[str | Path | None, Parameter(metavar="DIR")] = None
    """Where finished stages are kept; without it, in $IAPT_EXPORT_CACHE or the user's cache."""
    revision: Annotated[str | None, Parameter(metavar="REV")] = None
    """Commit or branch of the model on the hub."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**32 - 1), "new_tokens": (1, 2**20), "drafts": (0, MAX_DRAFTS)}
        if problems := type_problems(BuildRequest, vars(self)):
            raise_problems("build request", problems)
        problems = choice_problems(self) + range_problems(self, **limits)
        problems += rounding_problems(self.quantise) if self.quantise != AUTO else []
        if self.max_lora_rank is not None:
            problems += range_problems(self, max_lora_rank=(1, 65536))
        for name, kinds in (("adapters", str | Path), ("targets", str)):
            value = getattr(self, name)
            if isinstance(value, str | Path):
                problems.append(f"{name}={str(value)!r} is one text; expected a list of them")
            elif not isinstance(value, Sequence) or not all(isinstance(item, kinds) for item in value):
                problems.append(f"{name} is {shown(value)}; expected a list of texts")
        raise_problems("build request", problems)
