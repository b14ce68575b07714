"""The methods' settings, one frozen dataclass each, checked when they are made; and the methods' names.

Light to import, so that reading an adapter's configuration needs no torch. What the papers settle and
what is our choice stands in docs/methods.md. The flags of ``iapt-export train`` are these fields, and the texts
below them their help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from cyclopts import Parameter

from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import choice_problems, raise_problems, range_problems
from iapt_export.contract.tenant_card import OLDER

Activation = Literal["rational", "gelu", "relu", "silu", "tanh"]
CoefficientLearning = Literal["joint", "bilevel", "frozen"]
Initial = Literal["text", "vocabulary", "random"]
InitFunction = Literal["gelu", "relu", "silu", "tanh", "leaky_relu", "identity", "random"]
Pooling = Literal["attention", "mean", "max"]
RationalForm = Literal["A", "B"]
Sharing = Literal["all", "none", "groups"]

MAX_DEGREE = 8
"""Largest polynomial degree of a rational activation; beyond it fp32 Horner evaluation loses its accuracy."""
MAX_PROMPT = 1024
INITIAL_TEXT = "Read the text and answer the question about it:"
"""Our default text for prompts that start from words."""


@dataclass(frozen=True, kw_only=True)
class IAPTConfig:
    """IAPT (arXiv 2405.18203): soft tokens that a small generator makes of the instruction, anew for every layer.

    Settled by the paper: the order down, pool, activate, up; self-attention pooling with learned
    queries; a learned rational activation; projections shared across layers; four soft tokens.
    Everything else here (degrees, form, bias, scale, normalised input, bottleneck) is our choice.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 4
    """Soft tokens per layer (P)."""
    bottleneck: int = 256
    """Width between the down- and the up-projection (R)."""
    numerator_degree: int = 5
    """Degree m of the rational activation's numerator."""
    denominator_degree: int = 4
    """Degree n of the rational activation's denominator."""
    rational_form: RationalForm = "B"
    """Denominator: A is 1 + sum |b_k x^k|, B is 1 + |sum b_k x^k|."""
    init_function: InitFunction = "gelu"
    """Function that the rational activation approximates before training; or coefficients drawn at random."""
    pooling: Pooling = "attention"
    """How T instruction tokens become P rows: learned queries, or mean / max over P adaptive bins."""
    activation: Activation = "rational"
    """Learned rational activation, or a fixed one (an ablation of the paper)."""
    sharing: Sharing = "all"
    """Layers that share the two projections: all, none (each has its own), or groups of neighbours."""
    num_groups: int = 1
    """Number of groups when sharing is 'groups'."""
    bias: bool = True
    """Give both projections a bias."""
    scale: bool = False
    """Divide the pooling scores by sqrt(R)."""
    normalize: bool = True
    """Divide each token's hidden state by its root mean square before the generator reads it."""
    coefficients: CoefficientLearning = "joint"
    """Learn the activation's coefficients jointly, bi-level on a held-out half of the data, or not at all."""
    older: ClassVar[dict[str, Any]] = OLDER["IAPT"]  # what files that lack a field were made with
    training_fields: ClassVar[tuple[str, ...]] = ("coefficients", "init_function")
    # say how weights were found and not what is computed, so tenants that differ in nothing else share a stack

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(
            self,
            prompt_length=(1, MAX_PROMPT),
            bottleneck=(1, 65536),
            numerator_degree=(1, MAX_DEGREE),
            denominator_degree=(1, MAX_DEGREE),
            num_groups=(1, 65536),
        )
        if self.sharing != "groups" and self.num_groups != 1:
            problems.append(f"num_groups={self.num_groups} needs sharing='groups', got sharing={self.sharing!r}")
        if self.init_function == "identity" and (self.numerator_degree < 3 or self.denominator_degree < 2):
            problems.append("init_function='identity' needs numerator_degree of at least 3, denominator_degree of 2")
        raise_problems("IAPT configuration", problems)

    def groups(self, num_layers: int) -> tuple[int, ...]:
        """The sharing group of each layer, as ``num_layers`` indices in ``range(G)``.

        Raises:
            IaptError: more groups than layers.
        """
        count = {"all": 1, "none": num_layers, "groups": self.num_groups}[self.sharing]
        if count > num_layers:
            raise IaptError(f"num_groups={count} is more than the backbone's {num_layers} layers; lower num_groups")
        return tuple(layer * count // num_layers for layer in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Where a prompt starts that stands before the embedded input."""

    init: Initial = "text"
    """Initial prompt: a text's embeddings, embeddings drawn from the vocabulary, or N(0, 0.02)."""
    init_text: str = INITIAL_TEXT
    """The text that an initial prompt of words repeats."""
    training_fields: ClassVar[tuple[str, ...]] = ("init", "init_text")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(_Words):
    """Prompt tuning (arXiv 2104.08691): P trained vectors before the embedded input. PEFT's ``PROMPT_TUNING``.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 20
    """Soft tokens (P)."""

    def __post_init__(self) -> None:
        problems = choice_problems(self) + range_problems(self, prompt_length=(1, MAX_PROMPT))
        raise_problems("prompt tuning configuration", problems)


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig:
    """P-tuning v2 (arXiv 2110.07602), prefix tuning: P trained keys and values a layer. PEFT's ``PREFIX_TUNING``.

    They enter after the key and value projections, so no rotary position is applied to them.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 20
    """Keys and values per layer (P)."""
    projection: bool = False
    """Train an embedding and a two-layer tanh network that makes the prefix of it; computed once at export."""
    projection_width: int = 128
    """Hidden width of that network."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(self, prompt_length=(1, MAX_PROMPT), projection_width=(1, 65536))
        raise_problems("prefix tuning configuration", problems)


@dataclass(frozen=True, kw_only=True)
class ADePTConfig(_Words):
    """ADePT (arXiv 2501.03291): a soft prompt, and an offset to every token's embedding by a shared small network.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 20
    """Soft tokens (P)."""
    bottleneck: int = 16
    """Width of the offset network (R)."""
    decode_offset: bool = False
    """Offset generated tokens as well; then the decode step depends on the tenant. Training follows this choice."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(self, prompt_length=(1, MAX_PROMPT), bottleneck=(1, 65536))
        raise_problems("ADePT configuration", problems)


@dataclass(frozen=True, kw_only=True)
class DePTConfig(_Words):
    """DePT (arXiv 2309.05173): a shorter soft prompt, and a low-rank offset by the token's position.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 20
    """Soft tokens (P)."""
    rank: int = 8
    """Rank of the offsets (R)."""
    max_length: int = 256
    """Instruction tokens that get an offset (S); later ones keep their embeddings."""
    alpha: float = 8.0
    """The offsets are scaled by alpha / sqrt(rank)."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(self, prompt_length=(1, MAX_PROMPT), rank=(1, 65536), max_length=(1, 65536))
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 < self.alpha <= 1e6:
            problems.append(f"alpha={self.alpha!r} is not a number above 0")
        raise_problems("DePT configuration", problems)


@dataclass(frozen=True, kw_only=True)
class LoPAConfig(_Words):
    """LoPA (arXiv 2405.15282): a task prompt times a gate that a frozen encoder's view of the instruction opens.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    prompt_length: int = 10
    """Soft tokens (P)."""
    rank: int = 4
    """Rank of the instance prompt (R)."""
    head_width: int = 0
    """Hidden width of the two heads; 0 takes the encoder's width."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(self, prompt_length=(1, MAX_PROMPT), rank=(1, 65536), head_width=(0, 65536))
        raise_problems("LoPA configuration", problems)


@dataclass(frozen=True, kw_only=True)
class LAMPConfig(_Words):
    """LAMP (arXiv 2502.12200), our reading: a soft prompt as truncated SVD, its tokens mixed, then averaged in blocks.

    The paper's compressed outer product was not available to us; docs/methods.md says what stands in its place.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    init_length: int = 100
    """Rows of the prompt that is decomposed (s)."""
    rank: int = 8
    """Singular values that are kept (R)."""
    window: int = 5
    """Rows averaged into one soft token; P = init_length / window."""

    @property
    def prompt_length(self) -> int:
        """Soft tokens (P) that reach the backbone."""
        return self.init_length // self.window

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        problems += range_problems(self, init_length=(1, 65536), rank=(1, 65536), window=(1, 65536))
        if not problems and self.init_length % self.window:
            problems.append(f"init_length={self.init_length} is not a multiple of window={self.window}")
        if not problems and self.rank > self.init_length:
            problems.append(f"rank={self.rank} is more than init_length={self.init_length}")
        if not problems and self.prompt_length > MAX_PROMPT:
            problems.append(f"init_length / window is {self.prompt_length}, more than {MAX_PROMPT} soft tokens")
        raise_problems("LAMP configuration", problems)


def _names(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """What a flag or a list of a file says: names, several in one text with commas between."""
    return tuple(name.strip() for token in tokens for name in token.value.split(","))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA (arXiv 2106.09685): a low-rank change of chosen linear layers, at every token. PEFT's ``LORA``.

    Raises:
        IaptError: a field has a value outside its range; all problems are listed together.
    """

    rank: int = 8
    """Rank of the change (R)."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    target_modules: Annotated[tuple[str, ...], Parameter(converter=_names, n_tokens=1, metavar="NAME,...")] = (
        "q_proj",
        "v_proj",
    )
    """Last names of the linear layers that are changed."""

    @property
    def prompt_length(self) -> int:
        """LoRA adds no soft tokens."""
        return 0

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def __post_init__(self) -> None:
        problems = choice_problems(self) + range_problems(self, rank=(1, 65536))
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 < self.alpha <= 1e6:
            problems.append(f"alpha={self.alpha!r} is not a number above 0")
        names = self.target_modules
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            problems.append(f"target_modules={names!r} is not a list of names, for example q_proj,v_proj")
        raise_problems("LoRA configuration", problems)


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv 2402.09353): LoRA that gives each output a length of its own. PEFT's ``LORA`` with ``use_dora``."""


METHOD_CONFIGS: dict[str, Any] = {
    "IAPT": IAPTConfig,
    "ADEPT": ADePTConfig,
    "LOPA": LoPAConfig,
    "LAMP": LAMPConfig,
    "DEPT": DePTConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "LORA": LoRAConfig,
}
"""``peft_type`` to the method's configuration; on the command line in lower case with dashes."""
ADAPTER_CONFIGS: dict[str, Any] = METHOD_CONFIGS | {"DORA": DoRAConfig}
"""What an adapter may be of: also what is read from PEFT and not trained here."""
DEFAULT_METHOD = "iapt"
"""The method that is trained where the user names none."""


def config_of(method: str) -> Any:
    """The configuration class of a method, named as on the command line or as in ``adapter_config.json``.

    Raises:
        IaptError: unknown method.
    """
    name = method.upper().replace("-", "_")
    if name not in METHOD_CONFIGS:
        known = ", ".join(flag_name(known) for known in METHOD_CONFIGS)
        raise IaptError(f"method {method!r} is not known; use one of {known}")
    return METHOD_CONFIGS[name]


def method_name(config: Any) -> str:
    """The ``peft_type`` that a configuration belongs to."""
    return next(name for name, cls in ADAPTER_CONFIGS.items() if type(config) is cls)


def flag_name(method: str) -> str:
    """A ``peft_type`` as the command line writes it."""
    return method.lower().replace("_", "-")


def of_another(setting: str, method: str) -> str:
    """A sentence where a setting, a field or a flag, is another method's, else empty."""
    name = setting.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")
    owners = [flag_name(key) for key, cls in METHOD_CONFIGS.items() if name in cls.__dataclass_fields__]
    return f"{setting} is a setting of --method {' or '.join(owners)}, not of {method}" if owners else ""
