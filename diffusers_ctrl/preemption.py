"""Being asked to leave: SIGTERM and SIGUSR1, which clusters send before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again
MARK_NAME = "preempted.txt"
FAILED_NAME = "failed.txt"
STARTED = time.time()
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """The process was asked to leave and left nothing undone: its exit status is EXIT_PREEMPTED."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption:
    """Within the block SIGTERM and SIGUSR1 end nothing by themselves.

    `asked` tells whether one has arrived; with `at_once` it raises `Preempted` where the process stands, for work that is simply done
    again. Blocks may be nested: the inner one counts. In a thread that is not the main one signals are left as they are.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if self.at_once:
            raise Preempted(f"{self.asked} arrived: leaving with exit status {EXIT_PREEMPTED}.")

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Leaves a file preempted.txt in the folder if the block is left by `Preempted`, and removes an older one before.

    Launchers (accelerate launch, torchrun) give their own exit status instead of the process's; a job script reads it from there. They also ask
    all processes to leave when one has failed: that one leaves failed.txt, and then the others' leaving is no preemption.
    """
    mark, failed = folder / MARK_NAME, folder / FAILED_NAME
    mark.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        if failed.stat().st_mtime < STARTED:  # a later one is of a process of this launch
            failed.unlink(missing_ok=True)
    try:
        yield
    except Preempted as left:
        if not failed.exists():
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"{left}\n")
        raise
    except BaseException as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            folder.mkdir(parents=True, exist_ok=True)
            failed.write_text(f"process {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}\n")
        raise
