"""Compute with a backbone whose weights stay in their files: a module reads its own for each call, and forgets them.

Computations that are given together go through the model abreast. Each is a thread that stops where it needs weights;
they are read once, and all that stopped for them compute with them, one after the other. So many rows cost one reading
of the files, and each is computed alone all the same.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iapt_export.contract.low_bits import Rounding
from iapt_export.contract.resources import free_memory
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.stored import STORED, load_mapped, outline_of, stored_weight

Read = Callable[[str], Tensor]
"""Gives a weight by its name in the model's state, in the type that it is computed in."""
Result = TypeVar("Result")
RESTORED_BYTES = 13
"""What ONNX Runtime takes for a weight of two graphs with ``DequantizeLinear``, of which it keeps what it restored:
11.8 to 12.8 measured for a Llama of 30 million parameters."""
READ, PLAIN = "read_weight", "model_without_reading"
"""Attributes of a streamed model: what gives its weights, and the model that copies are made of."""


def streamed(model: Any, read: Read | None = None) -> Any:
    """A copy of a model that reads its parameters when it computes with them; without gradients.

    Args:
        model: a transformers model, also an outline of `trainers.decoder.stored`; stays as it is, and must stay so.
        read: gives each parameter; None reads them as the model has them.

    Returns:
        A model whose own parameters, looked at from outside of a module's call, are the given model's.
    """
    model = vars(model).get(PLAIN, model)
    read = read or (lambda name: stored_weight(model, name))
    made = _copied(model)
    vars(made)[READ], vars(made)[PLAIN] = read, model

    def at_once(module: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad(), _filled(module, _read(module, path, read)):
            return forward(*args, **kwargs)

    _ask_before_computing(made, at_once)
    return made


def is_streamed(model: Any) -> bool:
    """Whether a model is one of `streamed`."""
    return READ in vars(model)


def copies_compared(roundings: Iterable[Rounding | None]) -> int:
    """The copies of a backbone in fp32 that a comparison holds beside a runtime's, see `has_room_for`.

    Args:
        roundings: of the targets; None for those that do not round.
    """
    found = [rounding for rounding in roundings if rounding]
    restores = any(rounding.is_scaled for rounding in found)
    return 1 + bool(found) + restores * (math.ceil(RESTORED_BYTES / 4) - 1)


def has_room_for(model: Any, copies: int) -> bool:
    """Whether a model's parameters fit into the memory that is free: ``copies`` times in fp32, and once for a runtime.

    True where the system does not say what is free.
    """
    free = free_memory()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return free is None or size * (copies + 1) < free


def load_or_stream(name_or_path: str, *, copies: int, **options: Any) -> Backbone:
    """`load_backbone` in fp32 where there is room for it; else one that is `streamed`, where its files allow it.

    Args:
        name_or_path: as `load_backbone` takes it.
        copies: see `has_room_for`.
        options: of `load_backbone`.
    """
    stored = load_mapped(name_or_path, **options)
    if stored is not None and not has_room_for(stored.model, copies):
        outline = outline_of(stored, "fp32")
        if outline is not None:
            return dataclasses.replace(outline, model=streamed(outline.model))
    del stored
    return load_backbone(name_or_path, **options)


def read_weight(model: Any, name: str) -> Tensor:
    """A parameter or buffer by its name in the state, as the model computes with it."""
    read: Read = vars(model).get(READ, functools.partial(stored_weight, model))
    return read(name)


def abreast(model: Any, calls: Sequence[Callable[[Any], Result]]) -> list[Result]:
    """Run computations over a model, each given one that nobody else uses at that time.

    Args:
        model: of `streamed`; any other is given to one call after the other.
        calls: each computes with the model that it is given, and with nothing that another call changes.

    Returns:
        Their results, in their order.

    Raises:
        BaseException: what a call raised; the others are ended.
    """
    if not is_streamed(model):
        return [call(model) for call in calls]
    jobs = [_Job(call, model) for call in calls]
    try:
        for job in jobs:
            job.start()
            job.goes_on()
        while waiting := [job for job in jobs if job.asks]:
            # who is furthest behind: those ahead wait for a weight that it will need as well
            first = min(waiting, key=lambda job: job.num_asked).asks
            assert first is not None
            with torch.no_grad():
                weights = _read(first.module, first.path, vars(model)[READ])
                for job in waiting:
                    if job.asks is not None and job.asks.path == first.path:
                        with _filled(job.asks.module, weights):
                            job.answer = job.asks.compute()
                        job.goes_on()
            del weights
        return [job.result for job in jobs]
    finally:
        for job in jobs:
            job.end()


class _Ask:
    """A module's call that waits for its weights."""

    def __init__(self, module: nn.Module, path: str, compute: Callable[[], Any]) -> None:
        self.module, self.path, self.compute = module, path, compute


class _Ended(BaseException):
    """Raised in a computation that nobody waits for any more."""


class _Job(threading.Thread):
    """One computation; it and the thread that runs `abreast` take turns."""

    result: Any

    def __init__(self, call: Callable[[Any], Any], model: Any) -> None:
        super().__init__(daemon=True)
        self.asks: _Ask | None = None
        self.answer: Any = None
        self.num_asked = 0
        self.error: BaseException | None = None
        self._call, self._is_ended = call, False
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._model = _copied(vars(model)[PLAIN])
        vars(self._model)[READ] = vars(model)[READ]
        _ask_before_computing(self._model, self._ask)

    def run(self) -> None:
        """The computation, from its first turn on."""
        self._turn.acquire()
        try:
            if not self._is_ended:
                self.result = self._call(self._model)
        except BaseException as error:
            self.error = error
        self._stopped.release()

    def goes_on(self) -> None:
        """Give it its turn until it asks or is done; in the other thread."""
        self.asks = None
        self._turn.release()
        self._stopped.acquire()
        self.answer = None
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Let the thread end, wherever it is; in the other thread."""
        if self.is_alive():
            self._is_ended = True
            self._turn.release()
            self.join()

    def _ask(self, module: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.current_thread() is not self:  # a module inside one that is computed now
            with _filled(module, _read(module, path, vars(self._model)[READ])):
                return forward(*args, **kwargs)
        self.asks = _Ask(module, path, lambda: forward(*args, **kwargs))
        self.num_asked += 1
        self._stopped.release()
        self._turn.acquire()
        if self._is_ended:
            raise _Ended
        return self.answer


def _copied(model: Any) -> Any:
    """The same modules over the same tensors."""
    kept = [*model.parameters(), *model.buffers(), vars(model).get(STORED), model.config, model.generation_config]
    return copy.deepcopy(model, {id(item): item for item in kept if item is not None})


def _ask_before_computing(model: nn.Module, ask: Callable[..., Any]) -> None:
    """Let every module that has parameters of its own compute by ``ask(module, path, forward, args, kwargs)``."""

    def asking(module: nn.Module, path: str) -> Callable[..., Any]:
        forward = module.forward
        return lambda *args, **kwargs: ask(module, path, forward, args, kwargs)

    for path, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            module.forward = asking(module, path)


def _read(module: nn.Module, path: str, read: Read) -> dict[str, Tensor]:
    return {
        name: read(f"{path}.{name}" if path else name) for name, own in module._parameters.items() if own is not None
    }


@contextmanager
def _filled(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give a module its weights while the context is open."""
    before = dict(module._parameters)
    module._parameters.update(weights)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(before)
