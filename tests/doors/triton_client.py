"""What clients of Triton do; runs in the environment that has ``tritonclient`` and prints JSON.

``python triton_client.py SCENARIO '{"grpc": PORT, "http": PORT, ...}'``
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http

MODEL = "iapt"
TYPES = {"max_tokens": "INT32", "temperature": "FP32", "top_p": "FP32", "seed": "UINT64", "input_ids": "INT64"}
NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "INT64": np.int64, "BOOL": bool}
SECONDS = 20


def inputs(fields):
    """A request's tensors."""
    made = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        kind = TYPES.get(name, "BOOL" if isinstance(value, bool) else "BYTES")
        array = np.array([v.encode() for v in values], object) if kind == "BYTES" else np.array(values, NUMPY[kind])
        tensor = grpc.InferInput(name, [len(values)], kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


class Stream:
    """One gRPC stream with any number of requests."""

    def __init__(self, port):
        self.client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self.answers = {}
        self.errors = []
        self.changed = threading.Condition()
        self.client.start_stream(self.came)

    def came(self, result, error):
        with self.changed:
            if error is not None:
                self.errors.append(f"{error.status() or ''} {error.message()}")
            else:
                response = result.get_response()
                answer = self.answers.setdefault(response.id, {"tokens": [], "text": b"", "reason": "", "responses": 0})
                if result.as_numpy("token") is not None:
                    answer["tokens"] += result.as_numpy("token").tolist()
                    answer["text"] += result.as_numpy("text_output")[0]
                    answer["reason"] = result.as_numpy("finish_reason")[0].decode()
                    answer["responses"] += 1
            self.changed.notify_all()

    def ask(self, number, **fields):
        self.client.async_stream_infer(MODEL, inputs(fields), request_id=str(number))

    def wait(self, done):
        with self.changed:
            if not self.changed.wait_for(lambda: done(self), SECONDS):
                raise TimeoutError(f"nothing came: {self.answers} {self.errors}")

    def finished(self):
        return [answer for answer in self.answers.values() if answer["reason"]]


def stream(ports, requests):
    """Every request over one gRPC stream."""
    made = Stream(ports["grpc"])
    for number, fields in enumerate(requests):
        made.ask(number, **fields)
    made.wait(lambda s: len(s.finished()) + len(s.errors) == len(requests))
    made.client.stop_stream()
    answers = [made.answers.get(str(number)) for number in range(len(requests))]
    return [a and {**a, "text": a["text"].decode()} for a in answers], made.errors


def generate(ports, requests, path="generate"):
    """Every request over HTTP, one after another: status and content."""
    found = []
    for fields in requests:
        url = f"http://127.0.0.1:{ports['http']}/v2/models/{MODEL}/{path}"
        try:
            with urllib.request.urlopen(url, json.dumps(fields).encode(), SECONDS) as response:
                found.append((response.status, response.read().decode()))
        except urllib.error.HTTPError as error:
            found.append((error.code, error.read().decode()))
    return found


def rows_of(path):
    """How many rows the last step had; a file that is being written is read again."""
    while not (text := Path(path).read_text()):
        pass
    return int(text)


def cancel(ports, long, rows):
    """Eight rows decode, a client with seven of them leaves: the rows a moment later, and what the eighth gets."""
    leaving, staying = Stream(ports["grpc"]), Stream(ports["grpc"])
    staying.ask("stay", **long)
    for number in range(7):
        leaving.ask(number, **long)
    leaving.wait(lambda s: len(s.answers) == 7)
    before = rows_of(rows)
    leaving.client.stop_stream(cancel_requests=True)
    time.sleep(0.5)
    after = rows_of(rows)
    staying.wait(lambda s: s.finished())
    return before, after, staying.answers["stay"]["tokens"]


def full(ports, long, short):
    """Eight rows and eight places in the queue are taken: what becomes of one more, and of another tenant's."""
    made = Stream(ports["grpc"])
    for number in range(8):
        made.ask(number, **long)
    made.wait(lambda s: len(s.answers) == 8)
    for number in range(8, 16):
        made.ask(number, **long)
    time.sleep(0.2)
    refused = Stream(ports["grpc"])
    refused.ask("more", **long)
    refused.wait(lambda s: s.errors)
    over_http = generate(ports, [{**long, "stream": False}])
    other = generate(ports, [{**short, "stream": False}])
    made.wait(lambda s: len(s.finished()) == 16)
    return refused.errors, over_http, other


def reload(ports, long, short, kill):
    """Kill the model's process while it answers, or unload it; then load it again."""
    control = http.InferenceServerClient(f"127.0.0.1:{ports['http']}", network_timeout=SECONDS)
    made = Stream(ports["grpc"])
    made.ask("under way", **long)
    made.wait(lambda s: s.answers)
    if kill:
        for stub in kill:
            os.kill(stub, signal.SIGKILL)
        time.sleep(1)
        found = {"ended": made.errors, "ready": control.is_model_ready(MODEL), "answers": generate(ports, [short])}
        control.unload_model(MODEL)
    else:
        control.unload_model(MODEL)
        made.wait(lambda s: s.finished())
        found = {"tokens": made.answers["under way"]["tokens"], "answers": generate(ports, [short])}
    deadline = time.monotonic() + SECONDS
    while control.is_model_ready(MODEL):
        if time.monotonic() > deadline:
            raise TimeoutError("the model stays loaded")
        time.sleep(0.05)
    found["unloaded"] = generate(ports, [short])
    control.load_model(MODEL)
    found["loaded"] = control.is_model_ready(MODEL)
    found["again"] = generate(ports, [short])
    return found


if __name__ == "__main__":
    try:
        print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # a stream that never ends would keep its thread, and with it this process
