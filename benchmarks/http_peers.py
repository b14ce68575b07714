"""What is measured beside our server: ``PYTHON benchmarks/http_peers.py llama|genai JSON``.

``llama`` is llama.cpp's own HTTP server, from the package ``xllamacpp``, and serves until it is terminated. ``genai``
is the engine of ``onnxruntime-genai``, which has no server: it answers all requests twice and prints, as JSON, the
tokens of the second time and what they took. Standard library and that package (with NumPy) only, so that it runs where
this project is not installed.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from typing import Any


def llama(asked: dict[str, Any]) -> None:
    """Load and serve on 127.0.0.1."""
    import xllamacpp  # type: ignore[import-untyped, import-not-found, unused-ignore]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["gguf"]
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = asked["port"]
    parameters.n_parallel = asked["streams"]
    parameters.n_ctx = asked["streams"] * asked["context"]  # shared out among the streams
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = asked["threads"]
    server = xllamacpp.Server(parameters)
    print(f"llama.cpp runs on {server.listening_address}", flush=True)
    threading.Event().wait()


def genai(asked: dict[str, Any]) -> None:
    """Answer ``lengths`` requests at once, in as many rows; each has its own number of tokens.

    On a CPU the engine has static batches alone: its paged attention is CUDA's.
    """
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-untyped, import-not-found, unused-ignore]

    lengths, prompt = asked["lengths"], np.array(asked["prompt"], np.int32)
    config = og.Config(asked["folder"])
    threads = {"intra_op_num_threads": asked["threads"]}
    config.overlay(
        json.dumps(
            {
                "engine": {"static_batching": {"max_batch_size": len(lengths)}},
                "model": {"decoder": {"session_options": threads}},
                "search": {"max_length": len(prompt) + max(lengths) + 1},
            }
        )
    )
    engine = og.Engine(og.Model(config))
    events = engine.create_event_buffer(4 * len(lengths))

    def everyone() -> int:
        requests = []
        for length in lengths:
            requests.append(engine.create_request())
            turn = og.TurnOptions(requests[-1])
            turn.set_do_sample(False)
            turn.set_min_generated_tokens(length)  # past the end token
            turn.set_max_generated_tokens(length)
            requests[-1].begin_turn(prompt, turn)
        made = 0
        while engine.has_pending_requests():
            for event in engine.run(events):
                if event.flags & og.EngineEventFlags.FAILED:
                    raise SystemExit(f"the engine failed: {event.error_code}")
                made += bool(event.flags & og.EngineEventFlags.TOKEN)
        for request in requests:
            request.close()
        return made

    everyone()  # the first round allocates
    start, used = time.perf_counter(), _processor_seconds()
    made = everyone()
    figures = {"tokens": made, "s": time.perf_counter() - start, "processor_s": _processor_seconds() - used}
    print(json.dumps(figures), flush=True)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    {each.__name__: each for each in (llama, genai)}[sys.argv[1]](json.loads(sys.argv[2]))
