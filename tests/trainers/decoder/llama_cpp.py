"""llama.cpp as the judge of GGUF files, and the record of what it said: ``python -m tests.trainers.decoder.llama_cpp``.

The package ``xllamacpp`` brings llama.cpp. Where it is not installed, tests compare with the record; where it is, they
check the record too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[2] / "golden" / "gguf_llama_cpp.json"
EVERY = 4
"""Every fourth log-probability is recorded."""
CONTEXT = 256


def open_server(path: Path) -> Any:
    """llama.cpp over one file, in fp32 and on one thread."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = CONTEXT, 1, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads, settings.warmup, settings.verbosity = 1, False, 0
    return xllamacpp.Server(settings)


def last_log_probabilities(path: Path, tokens: tuple[int, ...], num_words: int) -> np.ndarray:
    """``[V]`` float64 over the word after the last token."""
    printable = 60  # an answer that is no whole character comes without probabilities, so one is forced
    answer = open_server(path).handle_completions(
        {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": num_words,
            "temperature": 0.0,
            "logit_bias": [[printable, 1000.0]],
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    found = np.full(num_words, np.nan)
    for word in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[word["id"]] = word["logprob"]
    return found


def token_ids(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """Ids of each text, with the special tokens that the file's tokenizer adds."""
    server = open_server(path)
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    return found


def record() -> dict[str, Any]:
    """What llama.cpp says to every case."""
    import xllamacpp

    from tests.tiny import VOCABULARY
    from tests.trainers.decoder.gguf_cases import CASES, TOKENS
    from tests.trainers.decoder.gguf_files import write
    from tests.trainers.decoder.gguf_texts import TEXT_CASES, TEXTS

    found: dict[str, Any] = {"xllamacpp": xllamacpp.__version__, "every": EVERY, "models": {}, "texts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = write(Path(folder) / "tiny.gguf", case)
            found["models"][name] = last_log_probabilities(path, TOKENS, VOCABULARY)[::EVERY].round(5).tolist()
        for name, case in TEXT_CASES.items():
            found["texts"][name] = token_ids(write(Path(folder) / "tiny.gguf", case), TEXTS)
    return found


def main() -> int:
    GOLDEN.parent.mkdir(exist_ok=True)
    found = record()
    lines = [
        f'"{key}": {{\n' + ",\n".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in found[key].items()) + "\n}"
        for key in ("models", "texts")
    ]
    head = f'"xllamacpp": {json.dumps(found["xllamacpp"])},\n"every": {EVERY}'
    GOLDEN.write_text("{\n" + ",\n".join([head, *lines]) + "\n}\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(found['models'])} models, {len(found['texts'])} tokenizers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
