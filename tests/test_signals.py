"""merge_avg._signals: what stands in where signals cannot be held back, or repeated by an alarm."""

import signal
import threading
import time

import pytest

from merge_avg import _signals


@pytest.fixture
def came():
    """The numbers of signals that were handled."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("masks", [True, False])
def test_signals_wait(monkeypatch, came, masks):
    """One that comes meanwhile is handled at the end, once, also where none can be masked."""
    if not masks:
        monkeypatch.delattr(signal, "pthread_sigmask", raising=False)
    with _signals.held():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)
        assert not came
    assert came == [signal.SIGTERM]
    signal.raise_signal(signal.SIGTERM)
    assert came == 2 * [signal.SIGTERM]


def test_other_threads_have_no_signals(monkeypatch):
    """Where none can be masked, a thread that is not the main one need not hold any back."""
    monkeypatch.delattr(signal, "pthread_sigmask", raising=False)
    done = []

    def work():
        with _signals.held():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_handler_is_called_again_without_alarms(monkeypatch, came):
    """Without alarms a thread repeats the signal, until that is not wanted any more."""
    monkeypatch.setattr(_signals, "_ALARM", False)
    monkeypatch.setattr(_signals, "_AGAIN", 0.01)
    _signals.repeat(signal.SIGTERM)
    limit = time.monotonic() + 20
    while not came and time.monotonic() < limit:
        time.sleep(0.005)
    assert came == [signal.SIGTERM]
    monkeypatch.setattr(_signals, "_AGAIN", 0.05)
    _signals.repeat(signal.SIGTERM)
    _signals.repeat_no_more()
    time.sleep(0.1)
    assert came == [signal.SIGTERM]
