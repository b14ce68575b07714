"""llama.cpp's own HTTP server, from the package ``xllamacpp``: ``PYTHON benchmarks/http_peers.py JSON``.

Serves until it is terminated. Standard library and that package only, so that it runs where this project is not
installed.
"""

from __future__ import annotations

import json
import sys
import threading


def main() -> None:
    """Load and serve on 127.0.0.1."""
    import xllamacpp  # type: ignore[import-untyped, import-not-found, unused-ignore]

    asked = json.loads(sys.argv[1])
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


if __name__ == "__main__":
    main()
