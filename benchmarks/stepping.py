"""A loop over ``serve.onnx`` with nothing around it: what the graph itself costs, and what its logits are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

Arrays = Mapping[str, np.ndarray]


class Steps:
    """A graph, its tenants' weights, and the cache of one batch, written in place.

    Args:
        graph: ``serve.onnx``.
        stacks: the graph's inputs ``METHOD.TENSOR [N, ...]``; those that are missing are zeros of one tenant.
        threads: of ONNX Runtime.
    """

    def __init__(self, graph: Path, stacks: Arrays, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.vocabulary = self.session.get_outputs()[0].shape[-1]
        self.fixed = {
            name: ort.OrtValue.ortvalue_from_numpy(stacks[name] if name in stacks else self._zeros(name))
            for name in self.inputs
            if "." in name and not name.startswith("past_key_values.") and not name.endswith(".tenant_index")
        }

    def _zeros(self, name: str) -> np.ndarray:
        return np.zeros([size if isinstance(size, int) else 1 for size in self.inputs[name].shape], np.float32)

    def start(self, indices: Arrays, capacity: int) -> None:
        """Begin a batch.

        Args:
            indices: ``METHOD.tenant_index [B]`` for each method.
            capacity: cache entries of a row.
        """
        self.indices = {name: np.asarray(index, np.int64) for name, index in indices.items()}
        rows = len(next(iter(self.indices.values())))
        self.cache = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, node.shape[1], capacity, node.shape[3]), np.float32))
            for name, node in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def read(self, rows: Sequence[Sequence[int]], num_slots: int) -> np.ndarray:
        """Read instructions, ``num_slots`` prompt slots before each: logits ``[B, V]``."""
        width = num_slots + max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, num_slots : num_slots + len(tokens)] = tokens
        self.ends = np.array([num_slots + len(tokens) - 1 for tokens in rows])
        return self._run(ids, np.tile(np.arange(width), (len(rows), 1)), reads=True)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """One token more a row: logits ``[B, V]``."""
        self.ends = self.ends + 1
        return self._run(np.array(tokens, np.int64)[:, None], self.ends[:, None], reads=False)

    def _run(self, ids: np.ndarray, positions: np.ndarray, *, reads: bool) -> np.ndarray:
        binding = self.session.io_binding()
        feeds = {
            "input_ids": ids,
            "position_ids": positions.astype(np.int64),
            "seqlens_k": self.ends.astype(np.int32),
            "total_sequence_length": np.array(self.ends.max() + 1, np.int32),
            "reads_instruction": np.array(reads),
            **self.indices,
        }
        for name in self.inputs:
            if name in self.cache:
                binding.bind_ortvalue_input(name, self.cache[name])
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), self.cache[name])
            elif name in self.fixed:
                binding.bind_ortvalue_input(name, self.fixed[name])
            else:
                binding.bind_cpu_input(name, feeds[name])
        logits = ort.OrtValue.ortvalue_from_shape_and_type([len(ids), 1, self.vocabulary], np.float32)
        binding.bind_ortvalue_output("logits", logits)
        self.session.run_with_iobinding(binding)
        return logits.numpy()[:, 0]
