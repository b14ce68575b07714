"""Every method's module by name."""

from __future__ import annotations

from typing import Any

from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.method import Method
from trainers.methods.adept import ADePT, TokenTable, TokenTableConfig
from trainers.methods.configs import ADAPTER_CONFIGS, method_name
from trainers.methods.dept import DePT, PositionTable, PositionTableConfig
from trainers.methods.iapt import IAPT
from trainers.methods.lamp import LAMP
from trainers.methods.lopa import LoPA
from trainers.methods.lora import DoRA, LoRA
from trainers.methods.prefix_tuning import PrefixTuning
from trainers.methods.prompt_tuning import PromptTuning

METHODS: dict[str, type[Method]] = {
    "IAPT": IAPT,
    "ADEPT": ADePT,
    "LOPA": LoPA,
    "LAMP": LAMP,
    "DEPT": DePT,
    "PROMPT_TUNING": PromptTuning,
    "PREFIX_TUNING": PrefixTuning,
    "LORA": LoRA,
}
ADAPTER_METHODS: dict[str, type[Method]] = METHODS | {"DORA": DoRA}
"""What an adapter may be of, see `trainers.methods.configs.ADAPTER_CONFIGS`."""
FORMS: dict[str, type[Method]] = ADAPTER_METHODS | {
    "TOKEN_TABLE": TokenTable,
    "POSITION_TABLE": PositionTable,
}
"""What the tenants of a bundle may be shipped as, by name."""
FORM_CONFIGS: dict[str, Any] = {
    **ADAPTER_CONFIGS,
    "TOKEN_TABLE": TokenTableConfig,
    "POSITION_TABLE": PositionTableConfig,
}
"""The configuration of each form."""


def new_method(config: Any, sizes: Sizes) -> Method:
    """The module that a configuration describes, with initial weights."""
    return ADAPTER_METHODS[method_name(config)](config, sizes)


def form_name(method: Method) -> str:
    """The name in `FORMS` of a module's class."""
    return next(name for name, cls in FORMS.items() if type(method) is cls)
