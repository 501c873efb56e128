"""What may take long without a limit of its own runs in a thread, and is waited for no longer than there is time."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")
MOST_WAITING = 64  # items; then the function waits for whoever takes them


class Worker(Generic[T]):
    """Runs a function in a thread of its own; what it puts can be waited for."""

    def __init__(self, run: Callable[[Callable[[T], None], threading.Event], None]) -> None:
        self.stop = threading.Event()
        self._room = threading.Semaphore(MOST_WAITING)
        self._queue: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._run = run
        threading.Thread(target=self._work, daemon=True, name="router").start()

    def _work(self) -> None:
        try:
            self._run(self._put, self.stop)
        except BaseException as exc:  # noqa: BLE001 -- raised again by whoever waits
            self._queue.put((None, exc))
        else:
            self._queue.put((None, None))

    def _put(self, item: T) -> None:
        self._room.acquire()
        if self.stop.is_set():
            self._room.release()  # nobody takes it, nor what may follow
        else:
            self._queue.put((item, None))

    def close(self) -> None:
        """Tells the function to end; it waits for nobody any more."""
        self.stop.set()
        self._room.release()

    def next(self, timeout_s: float) -> T | None:
        """The next item, None at the end; raises what the function raised.

        Raises:
            TimeoutError: if nothing came in time, or no time is left; the function goes on.
        """
        if timeout_s <= 0:  # also if something waits: a function that never pauses would outlive any deadline
            raise TimeoutError
        try:
            item, error = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        self._room.release()
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
        worker.close()
