"""Work ahead in a thread: the next items are made while the present one is used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


def prefetched(items: Generator[T], depth: int) -> Generator[T]:
    """The items, in their order, made in a thread that is at most ``depth`` of them ahead.

    An error in the thread is raised here, at the place of the item that could not be made, with the traceback
    of where it happened. Once this generator has ended, been closed or been dropped, the thread has ended and
    ``items`` is closed.

    Examples
    --------
    >>> list(prefetched((n * n for n in range(4)), 2))
    [0, 1, 4, 9]
    """
    shelf: _Shelf[T] = _Shelf(depth)
    thread = threading.Thread(target=_fill, args=(items, shelf), name="sample-prefetch", daemon=True)
    thread.start()
    try:
        yield from shelf.items()
    finally:
        shelf.stop()
        if thread is not threading.current_thread():  # the collector runs in any thread
            thread.join()


class _Shelf(Generic[T]):
    """A bounded queue between two threads that either end can shut, without polling."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room; False if nobody wants more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._depth)
            if not self._stopped:
                self._waiting.append(item)
                self._changed.notify_all()
            return not self._stopped

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def items(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()


def _fill(items: Generator[T], shelf: _Shelf[T]) -> None:
    try:
        try:
            for item in items:
                if not shelf.put(item):
                    break
        finally:
            items.close()
    except BaseException as error:  # the consumer's to handle, whatever it is
        shelf.end(error)
    else:
        shelf.end(None)
