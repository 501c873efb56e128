"""What may take long without a limit of its own runs in a thread, and is waited for no longer than there is time."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")
LEAST_WAIT_S = 0.001


class Worker(Generic[T]):
    """Runs a function in a thread of its own; what it puts can be waited for."""

    def __init__(self, run: Callable[[Callable[[T], None], threading.Event], None]) -> None:
        self.stop = threading.Event()
        self._queue: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._run = run
        threading.Thread(target=self._work, daemon=True, name="router").start()

    def _work(self) -> None:
        try:
            self._run(lambda item: self._queue.put((item, None)), self.stop)
        except BaseException as exc:  # noqa: BLE001 -- raised again by whoever waits
            self._queue.put((None, exc))
        else:
            self._queue.put((None, None))

    def next(self, timeout_s: float) -> T | None:
        """The next item, None at the end; raises what the function raised.

        Raises:
            TimeoutError: if nothing came in time; the function goes on.
        """
        try:
            item, error = self._queue.get(timeout=max(timeout_s, LEAST_WAIT_S))
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return item


def within(function: Callable[[threading.Event], T], left_s: float) -> T:
    """What a function returns or raises, if it does so in time; it is told by the event that nobody waits any more.

    Raises:
        TimeoutError: if not; the function goes on in its thread.
    """
    worker: Worker[T] = Worker(lambda put, stop: put(function(stop)))
    try:
        return cast("T", worker.next(left_s))
    finally:
        worker.stop.set()
