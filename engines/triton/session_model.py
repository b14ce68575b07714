"""What Triton's python backend runs: a session, whose tokens go out as they come. It can be imported in its stub alone.

``execute`` hands requests to the session and returns, so that Triton gives the next ones; one thread sends the tokens
of all, and sees which clients have left.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from engines.serving.generation import Generation
from engines.serving.request import Request
from engines.serving.sampling import Sampling
from engines.serving.session import Session
from engines.triton.repository import INPUTS
from iapt_export.contract.errors import IaptError

LOOK_SECONDS = 0.1
"""How often it looks which clients have left; asking for each token would cost as much as sending it."""
DRAIN_SECONDS = 60.0
_CODES = {
    "tenant_not_found": "NOT_FOUND",
    "queue_full": "UNAVAILABLE",
    "session_failed": "UNAVAILABLE",
    "session_closed": "UNAVAILABLE",
    "closed": "UNAVAILABLE",
    "generation_failed": "INTERNAL",
}
"""An `IaptError`'s code to Triton's; ``INVALID_ARG`` for all others."""

_log = logging.getLogger(__name__)


class Sending:
    """One request's answer on its way out."""

    def __init__(self, generation: Generation, sender: Any, *, stream: bool) -> None:
        self.generation = generation
        self._sender = sender
        self._stream = stream
        self.is_over = False
        """Whether its end was sent, behind which nothing may follow."""

    def send(self) -> None:
        """Send what has come; without ``stream``, when all has."""
        generation, tokens = self.generation, []
        try:
            while not generation.done and (token := generation.take()) is not None:
                tokens.append(token)
        except Exception as error:
            self.is_over = True
            refuse(self._sender, error)
            return
        reason = generation.partial.finish_reason if generation.done else ""
        if self._stream and (tokens or generation.done):
            text = "".join(token.text for token in tokens)
            self._give(text, [token.token for token in tokens], reason)
        elif generation.done:
            self._give(generation.partial.text, generation.partial.tokens, reason)

    def look(self) -> None:
        """Let go of the row of a client that has left."""
        if self._sender.is_cancelled():
            self.is_over = True
            self.generation.cancel()
            end_with(self._sender, "the client has cancelled", "CANCELLED")

    def _give(self, text: str, tokens: Sequence[int], reason: str) -> None:
        self.is_over = bool(reason)
        outputs = [
            triton.Tensor("text_output", np.array([text.encode("utf-8")], dtype=object)),
            triton.Tensor("token", np.array(tokens, dtype=np.int32)),
            triton.Tensor("finish_reason", np.array([reason.encode("utf-8")], dtype=object)),
        ]
        response = triton.InferenceResponse(output_tensors=outputs)
        self._sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reason else 0)


class TritonPythonModel:
    """The class that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session; what it refuses, Triton shows as the reason why the model cannot be loaded."""
        settings = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / settings["bundle"]
        self._session = Session.open(
            bundle,
            settings["target"],
            device=settings["device"],
            threads=int(settings["threads"]) if "threads" in settings else None,
            max_waiting=int(settings["max_waiting"]),
        )
        self._session.activate()
        _ = self._session.codec  # or the first request would wait for it
        self._arrived: SimpleQueue[Sending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="iapt-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Let requests enter the session's queue, or refuse them at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked, stream = read_request(request)
                sending = Sending(self._session.submit(asked, timeout=0), sender, stream=stream)
            except IaptError as error:
                refuse(sender, error)
            else:
                self._arrived.put(sending)  # so that it is known before its first token comes
                sending.generation.listen(functools.partial(self._arrived.put, sending))

    def finalize(self) -> None:
        """Answer what is under way, and give the memory back."""
        self._session.close(drain=True, timeout=DRAIN_SECONDS)
        self._arrived.put(None)
        self._thread.join()

    def _send_all(self) -> None:
        """The sending thread."""
        running: dict[Sending, None] = {}
        looked = time.monotonic()
        while True:
            try:
                sending = self._arrived.get(timeout=LOOK_SECONDS)
            except Empty:
                pass
            else:
                if sending is None:
                    return
                running[sending] = None
                _attempt(sending, sending.send)
            if time.monotonic() - looked >= LOOK_SECONDS:
                for each in running:
                    _attempt(each, each.look)
                looked = time.monotonic()
            for each in [each for each in running if each.is_over]:
                del running[each]


def _attempt(sending: Sending, action: Callable[[], None]) -> None:
    """Send, or look; where Triton does not take what is sent, that answer ends, and no other."""
    if sending.is_over:
        return  # it was told of tokens that went out together with earlier ones, or its client has left
    try:
        action()
    except Exception:
        _log.exception("an answer could not be sent")
        sending.is_over = True
        sending.generation.cancel()


def read_request(request: Any) -> tuple[Request, bool]:
    """The session's request that Triton's stands for, and whether its tokens are sent as they come.

    Raises:
        IaptError: a value is out of range, or no text.
    """
    found = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
    # Triton hands a field of ``generate`` that is no input to the model as a parameter, and says nothing
    unknown = [name for name in json.loads(request.parameters() or "{}") if not name.startswith("triton_")]
    if unknown:
        raise IaptError(f"there is no input {', '.join(unknown)}; expected {', '.join(INPUTS)}", field=unknown[0])

    def one(name: str, default: Any) -> Any:
        return found[name][0].item() if name in found else default

    def texts(name: str) -> list[str]:
        try:
            return [str(text, "utf-8") for text in found.get(name, ())]
        except UnicodeDecodeError as error:
            raise IaptError(f"{name} is not UTF-8: {error}", field=name) from error

    asked = Request(
        (texts("tenant") or [""])[0],
        (texts("text_input") or [""])[0],
        tokens=tuple(found["input_ids"].tolist()) if "input_ids" in found else (),
        max_new_tokens=one("max_tokens", 64),
        sampling=Sampling(one("temperature", 0.0), one("top_p", 1.0), one("seed", 0)),
        stop=tuple(texts("stop")),
        ignore_eos=one("ignore_eos", False),
    )
    return asked, one("stream", False)


def refuse(sender: Any, error: Exception) -> None:
    """Answer with an error, which is the end of the answer; of a defect of ours the client learns only that."""
    if isinstance(error, IaptError):
        end_with(sender, error.what, _CODES.get(error.code, "INVALID_ARG"))
        return
    _log.error("a request failed by a defect", exc_info=error)
    end_with(sender, "the model has a defect; the server's log says more", "INTERNAL")


def end_with(sender: Any, text: str, code: str) -> None:
    """Send an error by the name of its code; names, because Triton imports this file once before it has the codes."""
    told = triton.TritonError(text, getattr(triton.TritonError, code))
    response = triton.InferenceResponse(output_tensors=[], error=told)
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
