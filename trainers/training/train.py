"""Training, told as setup, fit, evaluate, save."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerState, set_seed

from iapt_export.contract.disk import file_sha256, sync
from iapt_export.contract.errors import IaptError
from iapt_export.contract.places import check_outside_bundles
from iapt_export.contract.prompt_format import HOW
from trainers.adapters.adapter import CONFIG_FILE, EXAMPLES_FILE, WEIGHTS_FILE, AdapterConfig
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import Backbone
from trainers.decoder.insertion import sizes_of
from trainers.decoder.instruction import padding_id
from trainers.decoder.method import Method
from trainers.methods.configs import method_name
from trainers.methods.forms import METHODS, new_method
from trainers.training.card import Run, write_card
from trainers.training.config import TrainConfig, TrainRequest
from trainers.training.data import (
    check_labels,
    check_rows,
    collate,
    count_seen,
    encode_examples,
    example_prompts,
    find_labels,
    format_of,
    sample,
    shared_system_prompt,
    split_holdout,
    told_of_cuts,
    told_of_system_prompts,
)
from trainers.training.evaluate import Evaluation, Report, beside_backbone, evaluate
from trainers.training.evaluate_adapter import load_as_trained_on
from trainers.training.finished import TrainResult, find_finished
from trainers.training.loop import (
    AdapterTrainer,
    EpochSampler,
    Progress,
    PromptTuned,
    arguments_of,
    check_tracker,
    freeze,
)
from trainers.training.records import Example, read_examples
from trainers.training.work import (
    FINISHED,
    STATE_FILE,
    UNFINISHED,
    begin,
    kept,
    newest_whole,
    only_run,
    publish,
    read_record,
    read_seconds,
    record_of,
    work_folder,
    write_record,
)

ADAPTER_FILES = {CONFIG_FILE, WEIGHTS_FILE}


class InterruptedTraining(KeyboardInterrupt):
    """Ctrl-C, with a text that says what is kept and how to go on."""


@dataclass
class Setup:
    """Everything that `fit` needs."""

    backbone: Backbone
    training: list[Example]
    evaluation: list[Example]
    adapter: AdapterConfig
    method: Method
    """With its random initial weights."""
    config: TrainConfig
    work: Path
    """``OUTPUT.training``, see `trainers.training.work`."""
    record: dict[str, Any]
    """The run's settings, by which its checkpoints and its adapter are known."""
    seen: int = 0
    """Of ``evaluation``, examples that are trained on as well, which only a file of its own can have."""
    notes: list[str] = field(default_factory=list)
    """What of the data no model sees: a sentence each."""

    @property
    def staged(self) -> Path:
        """Where the adapter is put together."""
        return self.work / UNFINISHED / "adapter"


def train(
    request: TrainRequest, *, say: Callable[[str], None] | None = None, command: str | None = None
) -> TrainResult:
    """Train an adapter and write its directory, model card included; the package has it as ``trainers.train``.

    While it runs, only ``OUTPUT.training`` exists; ``OUTPUT`` appears, or is replaced, when all is done.

    Args:
        request: what is wanted.
        say: takes progress lines; prints to stderr if None.
        command: what to name in the card as the command of this run; put together from the settings if None.

    Returns:
        The adapter with its scores, loss history and times.

    Raises:
        IaptError: bad data, an output that is not ours, a finished adapter without ``overwrite``, an earlier run's
            checkpoints without ``resume``, a backbone that cannot be loaded, or a loss that is no number.
        InterruptedTraining: a KeyboardInterrupt that says what is kept.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    config = request.config
    if method_name(request.method) not in METHODS:
        raise IaptError("DoRA is not trained here; train it with PEFT, whose adapters build takes")
    if config.learning_rate == 0:
        config = replace(config, learning_rate=METHODS[method_name(request.method)].learning_rate)
        request = replace(request, config=config)
    record = record_of(request)
    output = Path(request.output)
    check_outside_bundles(output, "the output")
    if Path.cwd().is_relative_to(output.resolve()):
        raise IaptError(f"the output {output} is where this command runs, or above it; give a folder of its own")
    try:
        with only_run(output):
            return find_finished(request, record, say) or _train(request, record, say, command)
    except KeyboardInterrupt:
        raise InterruptedTraining(f"train was interrupted; {kept(work_folder(output), output, record)}") from None


def _train(
    request: TrainRequest, record: dict[str, Any], say: Callable[[str], None], command: str | None
) -> TrainResult:
    setup = _setup(request, record)
    trainer = _trainer(setup, say)
    state, seconds = _fit(trainer, setup, say)
    history = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    result = TrainResult(Path(request.output), state.global_step, history, None, None, seconds)
    if trainer.is_world_process_zero():
        result.report, result.baseline = _evaluate(trainer, setup, say)
        _save(setup, result, request, command)
        beside = beside_backbone(result.report, result.baseline)
        say(f"wrote {result.output}: {result.report.summary()}{beside}")
    return result


def _setup(request: TrainRequest, record: dict[str, Any]) -> Setup:
    """Read the data before the backbone: its errors are the more frequent ones."""
    model_name, method, config = request.model, request.method, request.config
    check_tracker(config.report_to)
    examples = read_examples(request.data)
    labels = find_labels(examples, config.task)
    if config.eval_file:
        training, held_out = examples, read_examples(config.eval_file)
        check_labels(held_out, labels, f"{config.eval_file} has responses that the training data lacks")
    else:
        training, held_out = split_holdout(examples, config.holdout, config.seed)
    backbone, sha256 = load_as_trained_on(model_name, config)
    if backbone.tokenizer is None:
        raise IaptError(f"the backbone {model_name} has no tokenizer; training needs one")
    set_seed(config.seed)
    sizes = sizes_of(backbone.model)
    module = new_method(method, sizes)
    if config.weight_decay and not set(module.decayed) & set(module.state_dict()):
        raise IaptError(
            f"weight_decay={config.weight_decay} acts on an adapter's matrices, and {method_name(method)} with these "
            "settings has a prompt alone, which is not decayed; leave it out"
        )
    sizes = replace(sizes, linears={name: sizes.linears[name] for name in module.linear_names})
    adapter = AdapterConfig(
        base_model_name_or_path=config.base_model_name or model_name,
        backbone_fingerprint=backbone.fingerprint,
        backbone_weights_sha256=sha256,
        **asdict(sizes),
        method=method,
        revision=backbone.revision,
        prompt_format=format_of(backbone.tokenizer, config.prompt_format, [*training, *held_out]),
        system_prompt=shared_system_prompt(training),
        eos_token_id=backbone.tokenizer.eos_token_id,
        labels=labels,
        weights=config.weights,
        quantise=config.rounding.quantise if config.rounding else "",
    )
    work = work_folder(Path(request.output))
    notes = told_of_system_prompts(training)
    if left_out := 0 if config.eval_file else len(examples) - len(training) - len(held_out):
        notes.append(f"{left_out:,} examples are left out of training, whose instructions are held out as well")
    held_out = sample(held_out, config.max_eval_examples, config.seed)
    seen = count_seen(training, held_out)
    return Setup(backbone, training, held_out, adapter, module, config, work, record, seen, notes)


def _trainer(setup: Setup, say: Callable[[str], None]) -> AdapterTrainer:
    config, tokenizer = setup.config, setup.backbone.tokenizer
    encode = functools.partial(
        encode_examples,
        tokenizer,
        prompt_format=setup.adapter.prompt_format,
        max_instruction=config.max_instruction_tokens,
        max_response=None if setup.adapter.labels else config.max_response_tokens,
    )
    items, held_out = encode(setup.training), encode(setup.evaluation)
    setup.notes += told_of_cuts(items, "training examples", config)
    setup.notes += told_of_cuts(held_out, "examples to evaluate on", config)
    check_rows([*items, *held_out], tokenizer, setup.backbone.model, setup.method.num_slots)
    if config.start == "backbone":
        first = items[0]
        setup.method.start(setup.backbone.model, tokenizer, first["input_ids"][: first["instruction_length"]])
    learning = getattr(setup.adapter.method, "coefficients", "joint")
    if learning == "frozen":
        freeze(setup.method)
    arguments = arguments_of(config, setup.work)
    chunk = arguments.train_batch_size * config.gradient_accumulation * arguments.world_size
    sampler = EpochSampler(
        [len(item["input_ids"]) for item in items],
        chunk,
        config.seed,
        config.group_by_length,
        alternate=learning == "bilevel",
    )
    trainer = AdapterTrainer(
        setup.adapter,
        sampler,
        model=PromptTuned(setup.backbone.model, setup.method),
        args=arguments,
        train_dataset=items,
        eval_dataset=held_out if config.eval_steps else None,
        data_collator=functools.partial(collate, pad_token_id=padding_id(tokenizer, setup.adapter.vocab_size)),
        callbacks=[Progress(say)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _fit(trainer: AdapterTrainer, setup: Setup, say: Callable[[str], None]) -> tuple[TrainerState, float]:
    """Train, from the newest checkpoint if asked, and stage the adapter.

    Returns:
        The state after the last step, and the seconds it took, those of resumed runs included.
    """
    count = sum(parameter.numel() for parameter in setup.method.parameters())
    say(f"training {count:,} parameters on {len(setup.training):,} examples, {HOW[setup.adapter.prompt_format]}")
    if setup.seen:
        say(f"{setup.seen:,} of {len(setup.evaluation):,} examples to evaluate on are trained on as well")
    for note in setup.notes:
        say(note)
    checkpoint = newest_whole(setup.work, say) if setup.config.resume else None
    trainer.accelerator.wait_for_everyone()  # nobody removes what another is still looking at
    if trainer.is_world_process_zero():
        begin(setup.work, setup.record, checkpoint)
    trainer.accelerator.wait_for_everyone()
    trainer.earlier_seconds = read_seconds(checkpoint) if checkpoint else 0.0
    if setup.config.resume:
        say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume from: starting at the first step")
    if (
        checkpoint
        and (state := TrainerState.load_from_json(str(checkpoint / STATE_FILE))).global_step == state.max_steps
    ):
        say(f"step {state.global_step} was the last one: nothing is left to train")
        trainer.check_checkpoint(checkpoint)
        setup.staged.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(checkpoint / file, setup.staged / file)
        return state, trainer.earlier_seconds
    trainer.began = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = trainer.seconds()
    trainer.save_model(str(setup.staged))  # every process takes part when the model is sharded
    return trainer.state, seconds


def _evaluate(trainer: AdapterTrainer, setup: Setup, say: Callable[[str], None]) -> tuple[Report, Report | None]:
    """Score the adapter as it was saved, and the plain backbone."""
    config, backbone = setup.config, setup.backbone
    if trainer.is_fsdp_enabled:  # its parameters are sharded over processes that are not here
        backbone, _ = load_as_trained_on(backbone.name_or_path, config)
    task = Evaluation(backbone.tokenizer, setup.evaluation, setup.adapter.labels, setup.adapter.prompt_format, config)
    method = load_adapter(setup.staged).module()
    say(f"evaluating the adapter on {len(setup.evaluation)} examples")
    report = evaluate(backbone.model, method, task, say)
    if not config.baseline:
        return report, None
    say("evaluating the plain backbone")
    return report, evaluate(backbone.model, None, task, say)


def _keep_prompts(setup: Setup, output: Path) -> str | None:
    """Put prompts beside the staged adapter: the user's own from the adapter at ``output``, else held-out ones.

    Returns:
        The hash of the file where it was made here, by which a later run knows it from a user's own.
    """
    there, staged, config = output / EXAMPLES_FILE, setup.staged / EXAMPLES_FILE, setup.config
    if there.is_file() and file_sha256(there) != read_record(output).get("examples_sha256"):
        shutil.copyfile(there, staged)
        return None
    limits = (setup.adapter.prompt_format, config.max_instruction_tokens, config.example_prompts)
    texts = example_prompts(setup.backbone.tokenizer, setup.evaluation, *limits)
    if not texts:
        return None
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts]
    staged.write_text("".join(lines), encoding="utf-8")
    return file_sha256(staged)


def _save(setup: Setup, result: TrainResult, request: TrainRequest, command: str | None) -> None:
    """Write prompts, the card and the record beside the staged adapter, and move it to its place."""
    prompts_sha256 = _keep_prompts(setup, result.output)
    run = Run(
        adapter=setup.adapter,
        config=setup.config,
        model_name=request.model,
        data=str(request.data),
        training_size=len(setup.training),
        steps=result.steps,
        seconds=result.seconds,
        history=result.history,
        report=result.report,
        baseline=result.baseline,
        output=str(result.output),
        command=command,
        seen=setup.seen,
        notes=setup.notes,
    )
    write_card(setup.staged, run)
    outcome = {"steps": result.steps, "history": result.history, "examples_sha256": prompts_sha256}
    write_record(setup.staged, setup.record, **outcome)
    sync(setup.staged)
    os.replace(setup.staged, setup.work / FINISHED)
    publish(setup.work, result.output)
