"""Signals that end a run: they let the step at hand and its state come to an end first."""

import os
import signal
import time
from typing import Any

REPEATS_SECONDS = 1.0  # a launcher passes on what the terminal may have sent already


class StopSignals:
    """
    A context in which SIGTERM, which clusters send, and SIGINT, which Ctrl-C sends, are only recorded, as `received`. A
    further SIGINT ends the process at once, with status 130. Must be entered in the main thread.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(signum), now
            if signum == signal.SIGINT:  # os.write, because a print that was interrupted can't be entered again
                os.write(2, b"\nends after this step and saves its state; Ctrl-C again ends at once\n")
        elif signum == signal.SIGINT and now - self._since > REPEATS_SECONDS:
            os._exit(128 + signum)
