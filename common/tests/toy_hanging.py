"""Jobs and samples that hang in their several ways, for worker processes."""

import os
import signal
import time

from engine.data import busy


def hang(kind: str, name: str) -> None:
    """pipe: waits for a writer that never comes; deaf: hears no signal; slow: longer than tests are patient; works:
    so too, and the processor with it.
    """
    if kind == "pipe":
        open(name, "rb").close()
    elif kind == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        time.sleep(600)
    elif kind == "slow":
        for _ in range(15):
            time.sleep(0.2)
            busy.alive()
    elif kind == "works":
        started = time.monotonic()
        while time.monotonic() - started < 4:
            sum(range(1000))
    elif kind == "die":
        os._exit(1)


def job(one: tuple[str, str]) -> str:
    hang(*one)
    return one[1]


class Sleepy:
    """Samples that are their own numbers, but some hang."""

    def __init__(self, count: int, kinds: dict[int, str], name: str) -> None:
        self.count, self.kinds, self.name = count, kinds, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> int:
        if key[0] in self.kinds:
            busy.alive(self.name)
            hang(self.kinds[key[0]], self.name)
        return key[0]
