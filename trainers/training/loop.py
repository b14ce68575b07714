"""The Hugging Face Trainer, told to train and save an adapter only.

accelerate, torchrun, FSDP, checkpoints, resuming and experiment trackers are the Trainer's own.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from iapt_export.contract.errors import IaptError
from trainers.adapters.adapter import Adapter, AdapterConfig
from trainers.adapters.directory import load_adapter, save_adapter
from trainers.decoder.method import Method, rows_of
from trainers.methods.rational import COEFFICIENTS
from trainers.training.config import TrainConfig
from trainers.training.data import IGNORED
from trainers.training.evaluate import response_loss
from trainers.training.work import UNFINISHED, differences, place_checkpoint, write_seconds

MEGABATCH = 50
"""Batches among which examples are sorted by length: enough to save padding, few enough to stay random."""
KEPT_CHECKPOINTS = 2
"""One more than is needed, should the newest be damaged."""


def arguments_of(config: TrainConfig, work: Path) -> TrainingArguments:
    """The Trainer's settings for a run that keeps its checkpoints in ``work``."""
    return TrainingArguments(
        output_dir=str(work),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="constant_with_warmup" if config.scheduler == "constant" else config.scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # else bf16 without a GPU is refused
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class DivergedError(IaptError):
    """The loss is no number any more."""


def check_tracker(name: str) -> None:
    """Refuse an experiment tracker that the Trainer does not know, or whose package is not installed.

    Raises:
        IaptError: which it is, and those that are known.
    """
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise IaptError(f"report_to is {name!r}, expected none, all or one of {', '.join(INTEGRATION_TO_CALLBACK)}")
    if name not in get_available_reporting_integrations():
        raise IaptError(f"report_to is {name!r}, whose package is not installed; install it, or say none")


class PromptTuned(nn.Module):
    """A frozen backbone and a method as one module that returns a loss."""

    def __init__(self, backbone: Any, method: Method) -> None:
        super().__init__()
        self.backbone = backbone
        self.method = method

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        instruction_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss per response token of one batch (int64 ``[B, T]`` each, see `trainers.training.data.collate`).

        Of several that make one step, ``num_items_in_batch`` says how many tokens they have together, so that the step
        is that of one large batch.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "instruction_mask": instruction_mask,
            "labels": labels,
        }
        loss, tokens = response_loss(self.backbone, rows_of(self.method), batch)
        return {"loss": loss / (tokens if num_items_in_batch is None else num_items_in_batch)}

    def train(self, mode: bool = True) -> PromptTuned:
        """Switch the method's mode; the backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        self.backbone.eval()
        return self


def freeze(method: Method) -> None:
    """Leave the method's rational activation as it starts."""
    for name in COEFFICIENTS:
        method.get_parameter(name).requires_grad_(False)


class EpochSampler(Sampler[int]):
    """The order of an epoch, a function of seed and epoch alone, so that a resumed run sees the same batches.

    With ``alternate`` the data is cut in two halves once and for all, and batches of the first and the second
    half take turns: the weights learn on one, the coefficients on the other.
    """

    def __init__(self, lengths: Sequence[int], chunk: int, seed: int, group_by_length: bool, alternate: bool) -> None:
        self.lengths, self.chunk, self.seed, self.epoch = lengths, chunk, seed, 0
        self.group_by_length = group_by_length
        everything = list(range(len(lengths)))
        random.Random(seed).shuffle(everything)
        middle = len(everything) // 2
        self.parts = [everything[:middle], everything[middle:]] if alternate else [everything]
        if alternate and middle < chunk:
            raise IaptError(
                f"coefficients=bilevel halves the data and needs {chunk} examples in each half for one step; "
                f"there are {len(lengths)} in all: give more data or a smaller batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if len(self.parts) == 1:
            return len(self.lengths)
        return 2 * self.chunk * (len(self.parts[0]) // self.chunk)

    def __iter__(self) -> Iterator[int]:
        source = random.Random(f"{self.seed}-{self.epoch}")
        chunks = [self._chunks(part, source) for part in self.parts]
        if len(chunks) == 1:
            ordered = chunks[0]
        else:
            whole = [[c for c in part if len(c) == self.chunk] for part in chunks]
            ordered = [chunk for pair in zip(*whole, strict=False) for chunk in pair]
        return (index for chunk in ordered for index in chunk)

    def _chunks(self, part: list[int], source: random.Random) -> list[list[int]]:
        """Cut a shuffled part into batches; an incomplete one comes last."""
        order = list(part)
        source.shuffle(order)
        if self.group_by_length:
            size = self.chunk * MEGABATCH
            order = [
                index
                for start in range(0, len(order), size)
                for index in sorted(order[start : start + size], key=lambda i: self.lengths[i])
            ]
        chunks = [order[start : start + self.chunk] for start in range(0, len(order), self.chunk)]
        tail = [chunks.pop()] if len(chunks[-1]) < self.chunk else []
        source.shuffle(chunks)
        return chunks + tail


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints are adapter directories plus the state of optimiser, scheduler and RNG.

    Weights are read from safetensors only. Resuming also reads the Trainer's own ``optimizer.pt`` and RNG files,
    with ``torch.load(weights_only=True)``: resume your own checkpoints, not somebody else's.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, adapter: AdapterConfig, sampler: EpochSampler, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.adapter = adapter
        self.sampler = sampler
        self.method: Method = self.accelerator.unwrap_model(self.model).method
        self.model_accepts_loss_kwargs = True
        self.is_saving = False
        self.began = time.monotonic()
        self.earlier_seconds = 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """A batch's loss, weighed so that the mean over rows, which the Trainer takes, is that over response tokens."""
        loss, logits, labels = super().prediction_step(model, inputs, *arguments, **named)
        lengths = [len(item["input_ids"]) - item["instruction_length"] for item in self.eval_dataset]
        of_batch = (inputs["labels"] != IGNORED).sum() / len(inputs["labels"])
        return loss * of_batch.to(loss.device) * len(lengths) / sum(lengths), logits, labels

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, one parameter group for each pair of learning rate and weight decay that the method asks for."""
        if self.optimizer is None:
            decayed, factors = self.method.decayed, self.method.learning_rate_factors()
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    own = name.rsplit(".", 1)[-1]
                    groups.setdefault((factors.get(own, 1.0), own in decayed), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            settings = [
                {
                    "params": groups[factor, decays],
                    "lr": self.args.learning_rate * factor,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                # the first group's rate is the one that is logged
                for factor, decays in sorted(groups, key=lambda group: group[0] != 1)
            ]
            self.optimizer = kind(settings, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch, forward and backward.

        Raises:
            DivergedError: the loss is NaN or infinite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss became {float(loss)} at step {self.state.global_step + 1}; try a lower learning_rate "
                f"(now {self.args.learning_rate:g}), more warmup_steps or a smaller max_grad_norm"
            )
        if len(self.sampler.parts) == 2:
            self._drop_gradients(coefficients=self.state.global_step % 2 == 0)
        return loss

    def _drop_gradients(self, coefficients: bool) -> None:
        """Keep either the coefficients or all else where it is in the coming update."""
        for name, parameter in self.model.named_parameters():
            if (name.rsplit(".", 1)[-1] in COEFFICIENTS) == coefficients:
                parameter.grad = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        states = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        prefix = "method."
        tensors = {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}
        save_adapter(Path(output_dir or str(self.args.output_dir)), self.adapter, tensors)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the Trainer write under another name, and rename what is whole."""
        written = Path(str(self.args.output_dir)) / UNFINISHED / f"checkpoint-{self.state.global_step}"
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # the part of torch.save that writes; it does not say what failed
                raise
            free = shutil.disk_usage(written.parent).free / 1e6
            raise IaptError(
                f"the checkpoint {written.name} could not be written whole below {written.parent}, where {free:,.0f} "
                "MB are free; free space there or raise the limit of a file's size (ulimit -f), then give the same "
                "command with --resume"
            ) from error
        self.is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_seconds(written, self.seconds())
            place_checkpoint(written, keep=KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def seconds(self) -> float:
        """How long this run has trained, with those that it goes on from."""
        return self.earlier_seconds + time.monotonic() - self.began

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self.is_saving else folder

    def check_checkpoint(self, checkpoint: Path) -> Adapter:
        """The adapter of a checkpoint.

        Raises:
            IaptError: it is of another run.
        """
        adapter = load_adapter(checkpoint)
        if differs := differences(vars(adapter.config), vars(self.adapter)):
            raise IaptError(
                f"{checkpoint} was written by a run with other settings or another backbone ({differs}); "
                "resume with the same settings, or delete the folder and start anew"
            )
        return adapter

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter = self.check_checkpoint(Path(resume_from_checkpoint))
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        target.method.load_state_dict(adapter.tensors)


class Progress(TrainerCallback):
    """One line per log: step, loss, learning rate, seconds per step, time left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.started, self.first = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, and warn of a warm-up that the run does not outlast."""
        self.started, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and (warmup := args.get_warmup_steps(state.max_steps)) >= state.max_steps:
            reached = args.learning_rate * (state.max_steps - 1) / warmup
            self.say(
                f"warning: the warm-up takes {warmup} steps and the run has {state.max_steps}, so the learning rate "
                f"reaches {reached:.1e} instead of {args.learning_rate:.1e}; a lower warmup_steps leaves it time"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Say where the run stands."""
        logs = logs or {}
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}")
            return
        pace = (time.monotonic() - self.started) / max(state.global_step - self.first, 1)
        left = pace * (state.max_steps - state.global_step)
        self.say(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"learning rate {logs['learning_rate']:.1e}  {pace:.2f} s/step  {left / 60:.0f} min left"
        )
