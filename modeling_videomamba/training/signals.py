"""Signals that end a run after the step at hand, with its state saved."""

import os
import signal
import time
from contextlib import suppress
from typing import Any

REPEATS_SECONDS = 1.0  # one Ctrl-C may arrive twice, from the terminal and from a launcher


class StopSignals:
    """
    A context in which SIGTERM (sent by clusters) and SIGINT (sent by Ctrl-C) are only recorded, as `received`. Another
    SIGINT ends the process at once, with status 130. Must be entered in the main thread.
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
            if signum == signal.SIGINT:
                # os.write, because the signal may have interrupted a print, of whose reader it may have been the end
                with suppress(OSError):
                    os.write(2, b"\nends after this step and saves its state; Ctrl-C again ends at once\n")
        elif signum == signal.SIGINT and now - self._since > REPEATS_SECONDS:
            os._exit(128 + signum)
