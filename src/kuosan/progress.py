"""Progress of long work on stderr: one line that moves on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time


def duration(seconds: float) -> str:
    """A length of time in words: 45 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """``progress(done, total, note)`` as often as one likes; it prints at a readable pace.

    Args:
        what: the first word of the line.
    """

    def __init__(self, what: str):
        self.what, self.printed = what, 0.0
        self.first: tuple[int, float] | None = None
        self.pace = 0.2 if sys.stderr.isatty() else 15.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (done, now)
        if done < total and now - self.printed < self.pace:
            return
        self.printed = now
        speed = (done - self.first[0]) / max(now - self.first[1], 1e-9)
        left = f", {duration((total - done) / speed)} left" if speed > 0 and done < total else ""
        line = f"{self.what} {done}/{total}  {note}{left}"
        end = "\n" if done >= total or not sys.stderr.isatty() else ""
        print(f"\r\033[K{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)
