"""A reading in a thread of its own, so that rows that decode do not wait for a long instruction.

Attention over soft prompts that a method makes of the whole instruction at each layer leaves no place to cut an
instruction in two, so it is read whole, and shares the processors with the steps.
"""

from __future__ import annotations

import threading

import numpy as np

from engines.serving.stepper import Reading


class BesideReading:
    """Runs as soon as it is made."""

    def __init__(self, reading: Reading) -> None:
        """Start.

        Args:
            reading: as `engines.serving.stepper.Stepper.begin` gives it.
        """
        self.reading = reading
        self._logits: np.ndarray | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="iapt-reading", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end, whatever it is."""
        self._thread.join()

    def result(self) -> np.ndarray:
        """Wait for the logits; raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._logits is not None
        return self._logits

    def _run(self) -> None:
        try:
            self._logits = self.reading.run()
        except BaseException as error:
            self._error = error
