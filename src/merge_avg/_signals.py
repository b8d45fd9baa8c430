"""The signals that the system has, and what stands in for calls about them that it lacks.

Windows has neither SIGHUP nor alarms, holds no signals back, and does not end a wait for a lock.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"  # the last is Ctrl-Break of Windows
STOPS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in _NAMES if hasattr(signal, name)
)
_ALARM = hasattr(signal, "setitimer")
# What `repeat` sends beside the signal itself.
ALARMS: tuple[signal.Signals, ...] = (signal.SIGALRM,) if _ALARM else ()
# Seconds for which one may wait without looking for signals; None: until whatever comes.
PATIENCE = None if hasattr(signal, "pthread_sigmask") else 0.1
_AGAIN = 0.1  # seconds
_due: list[object] = []  # the repetitions that are still wanted


def repeat(signum: int) -> None:
    """Call the handler of a signal again in a moment, with this or another number."""
    if _ALARM:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    # Not by `threading`, whose locks a signal within this handler would find taken.
    mark = object()
    _due.append(mark)
    _thread.start_new_thread(_call_later, (signal.Signals(signum), mark))


def _call_later(signum: signal.Signals, mark: object) -> None:
    time.sleep(_AGAIN)
    if mark in _due:
        _due.remove(mark)
        _thread.interrupt_main(signum)


def repeat_no_more() -> None:
    """Forget what `repeat` has begun."""
    if _ALARM:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _due.clear()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals wait meanwhile, and come at the end."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[int] = []
    handlers = {one: signal.signal(one, lambda signum, _: came.append(signum)) for one in STOPS}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            # None: not installed from Python, so it cannot be restored.
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        for signum in came:
            signal.raise_signal(signum)
