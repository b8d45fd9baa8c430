"""Threads: workers that take tasks by turns, and torch kept to one thread beside them."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from merge_avg.engine._worker import Worker
from merge_avg.plan import without_collector


def in_parallel(
    tasks: Iterator[Callable[[Worker], None]], make_worker: Callable[[], Worker], threads: int
) -> None:
    """Run tasks on worker threads, each with its own worker; raise the first error, and stop."""
    lock, stop = threading.Lock(), threading.Event()
    # A queue in C: a signal that ends the wait for it by an exception leaves no lock behind, on
    # which a worker would hang.
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            with contextlib.closing(make_worker()) as worker:
                while not stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        break
                    task(worker)
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            ended.put(error)
        else:
            ended.put(None)

    with ThreadPoolExecutor(threads, thread_name_prefix="merge-avg") as pool:
        try:
            with _signals_held():
                for _ in range(threads):
                    pool.submit(run)
            for _ in range(threads):
                if (error := ended.get()) is not None:
                    raise error
        finally:
            stop.set()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals wait while threads begin: an exception in between would leave locks behind."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def single_threaded() -> Iterator[Callable[[], None]]:
    """Keep torch to one thread meanwhile: its own cost more than they give on small windows.

    Yields:
        A function that imports torch, unless it is there, and keeps it to one thread.
    """
    before: list[int] = []
    lock = threading.Lock()

    def load() -> None:
        with lock:
            if not before:
                with without_collector():
                    import torch

                before.append(torch.get_num_threads())
                torch.set_num_threads(1)

    if "torch" in sys.modules:
        load()
    try:
        yield load
    finally:
        if before:
            sys.modules["torch"].set_num_threads(before[0])
