"""How PEFT lays out the methods that it shares with us: fields, tensors, and what its options mean. Checked with 0.21.

    PROMPT_TUNING    prompt_embeddings [P, D]
    P_TUNING         the same; PEFT saves what its encoder made
    MULTITASK_PROMPT_TUNING  the same, prefix_task_cols [N, P, R], prefix_task_rows [N, R, D]: task n multiplies the
                     embeddings by cols[n] rows[n]
    PREFIX_TUNING    prompt_embeddings [P, 2 L H K]: keys, then values of layer 0, of layer 1, ...

LoRA stands in `trainers.adapters.peft_lora`.

PEFT saves the table that a prefix's network makes, not the network. For a prefix with projection we write that table
and beside it our own tensors, which PEFT ignores and from which training resumes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from iapt_export.contract.errors import IaptError
from iapt_export.contract.settings import raise_problems
from trainers.adapters.adapter import tensor_problems
from trainers.decoder.backbone_sizes import Sizes
from trainers.decoder.insertion import sizes_of
from trainers.methods.configs import PrefixTuningConfig, PromptTuningConfig
from trainers.methods.prefix_tuning import PrefixTuning, from_table, prefix_width, to_table

TABLE = "prompt_embeddings"
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"
MAX_PROBLEMS = 8
"""Tensors named in one error text; a wrong backbone makes all of them wrong."""
ANY_OPTIONS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"}
ANY_OPTIONS |= {"auto_mapping", "peft_version"}
_PROMPT = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_INIT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}


class PeftForm:
    """One method in PEFT's layout, between its fields and tensors and our configuration and tensors."""

    options: ClassVar[set[str]]
    """Options that are read, or that matter in training alone; any other must be off."""
    remedy: ClassVar[str] = ""
    """What to do about an option that is on."""

    def allowed(self, sizes: Sizes) -> dict[str, tuple[Any, ...]]:
        """Option to the values that it may have."""
        return {"task_type": (None, "CAUSAL_LM")}

    def read(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], model: Any, source: str, task: int | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Our configuration and fp32 tensors of what stock PEFT wrote.

        Args:
            fields: ``adapter_config.json``.
            tensors: as PEFT names them.
            model: the backbone's.
            source: where they come from, for error texts.
            task: which task of an adapter for several; None where it has one.

        Raises:
            IaptError: tensors are missing, unknown, of another shape than the backbone asks for, or not finite.
        """
        raise NotImplementedError

    def fields(self, method: Any, sizes: Sizes) -> dict[str, Any]:
        """What stock PEFT reads of our configuration."""
        raise NotImplementedError

    def shapes(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """PEFT's name of each tensor to its shape."""
        raise NotImplementedError

    def to_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """Our tensors under PEFT's names."""
        raise NotImplementedError

    def from_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """PEFT's tensors, checked and in fp32, under our names."""
        raise NotImplementedError

    def linears(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, int]]:
        """The linear layers that the method changes."""
        return {}


class _VirtualTokens(PeftForm):
    """Methods whose trained part is one table, an entry for each virtual token."""

    def allowed(self, sizes: Sizes) -> dict[str, tuple[Any, ...]]:
        counts = {"num_transformer_submodules": (None, 1), "num_layers": (None, sizes.num_layers)}
        return super().allowed(sizes) | counts

    def fields(self, method: Any, sizes: Sizes) -> dict[str, Any]:
        return {
            "num_virtual_tokens": method.prompt_length,
            "num_transformer_submodules": 1,
            "num_layers": sizes.num_layers,
            "inference_mode": True,
        }


class _Prompt(_VirtualTokens):
    """A prompt before the embedded tokens, whichever of PEFT's three methods trained it."""

    options = (ANY_OPTIONS | _PROMPT | _INIT) | {
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
        *("num_ranks", "num_tasks", "prompt_tuning_init_task", "prompt_tuning_init_state_dict_path"),
    }

    def allowed(self, sizes: Sizes) -> dict[str, tuple[Any, ...]]:
        return super().allowed(sizes) | {"token_dim": (None, sizes.hidden_size)}

    def read(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], model: Any, source: str, task: int | None
    ) -> tuple[Any, dict[str, Tensor]]:
        sizes = sizes_of(model)
        method = PromptTuningConfig(prompt_length=fields.get("num_virtual_tokens"))  # type: ignore[arg-type]
        shapes = self.shapes(method, sizes)
        count = fields.get("num_tasks", 1) if fields["peft_type"] == "MULTITASK_PROMPT_TUNING" else None
        if count is None:
            check_tensors(shapes, tensors, source)
            return method, self.from_peft(method, tensors, sizes)
        if task is None and count != 1:
            raise IaptError(f"{source} holds prompts for {count} tasks; say which one the tenant is for: PATH,task=0")
        task = task or 0
        if not isinstance(count, int) or not 0 <= task < count:
            raise IaptError(f"{source}: task={task} is not one of its {count} tasks, which count from 0")
        rank = fields.get("num_ranks", 1)
        shapes |= {COLUMNS: (count, method.prompt_length, rank), ROWS: (count, rank, sizes.hidden_size)}
        check_tensors(shapes, tensors, source)
        columns, rows = tensors[COLUMNS][task].float(), tensors[ROWS][task].float()
        return method, {"prompt": tensors[TABLE].float() * (columns @ rows)}

    def fields(self, method: Any, sizes: Sizes) -> dict[str, Any]:
        return super().fields(method, sizes) | {"token_dim": sizes.hidden_size, "prompt_tuning_init": "RANDOM"}

    def shapes(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {TABLE: (method.prompt_length, sizes.hidden_size)}

    def to_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return {TABLE: tensors["prompt"]}

    def from_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        return {"prompt": tensors[TABLE].float()}


class _Prefix(_VirtualTokens):
    """Keys and values before those of the tokens, in every layer."""

    options = ANY_OPTIONS | _PROMPT | {"encoder_hidden_size", "prefix_projection", "init_weights"}

    def allowed(self, sizes: Sizes) -> dict[str, tuple[Any, ...]]:
        heads = {"num_attention_heads": (None, sizes.num_kv_heads)}
        return super().allowed(sizes) | {"token_dim": (None, prefix_width(sizes)), **heads}

    def read(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], model: Any, source: str, task: int | None
    ) -> tuple[Any, dict[str, Tensor]]:
        sizes = sizes_of(model)
        method = PrefixTuningConfig(prompt_length=fields.get("num_virtual_tokens"))  # type: ignore[arg-type]
        check_tensors(self.shapes(method, sizes), tensors, source)
        return method, self.from_peft(method, tensors, sizes)

    def fields(self, method: Any, sizes: Sizes) -> dict[str, Any]:
        # The table is written, which is all that PEFT reads: to PEFT there is no projection any more.
        prefix_fields = {"num_attention_heads": sizes.num_kv_heads, "prefix_projection": False}
        return super().fields(method, sizes) | {"token_dim": prefix_width(sizes), **prefix_fields}

    def shapes(self, method: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        projection_shapes = PrefixTuning.shapes(method, sizes) if method.projection else {}
        return {
            TABLE: (method.prompt_length, 2 * sizes.num_layers * prefix_width(sizes)),
            **projection_shapes,
        }

    def to_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        if not method.projection:
            return {TABLE: to_table(tensors["prefix"]).contiguous()}
        module = PrefixTuning(method, sizes)
        module.load_state_dict(tensors)
        return {**tensors, TABLE: to_table(module.deployed().get_parameter("prefix").detach()).contiguous()}

    def from_peft(self, method: Any, tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        table = floats.pop(TABLE)
        return floats if method.projection else {"prefix": from_table(table, sizes).contiguous()}


PROMPT_FORM, PREFIX_FORM = _Prompt(), _Prefix()


def check_tensors(shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], source: str) -> None:
    """Refuse tensors of other names, shapes or types, or that are not finite.

    Raises:
        IaptError: with the first problems listed.
    """
    problems = tensor_problems(shapes, tensors)
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[: MAX_PROBLEMS - 1], f"and {len(problems) - MAX_PROBLEMS + 1} tensors more"]
    raise_problems(f"{source}: the tensors do not fit the configuration and the backbone", problems)
