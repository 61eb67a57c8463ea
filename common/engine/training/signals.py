"""Ctrl-C and SIGTERM as requests: the engine finishes its step, saves, and says how to resume."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C) and SIGTERM instead of dying of them. A second Ctrl-C interrupts at once; schedulers send
    SIGTERM several times, and mean the same each time.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals belong to the main thread
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        hint = "again" if number == signal.SIGINT else "twice"
        text = f"finishing this step, then saving; press Ctrl-C {hint} to stop at once\n"
        # Not print: it may be in the middle of a line of its own, or its reader gone.
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout is not None:  # else descriptor 1 is of some other file
                os.write(sys.stdout.fileno(), text.encode())

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
