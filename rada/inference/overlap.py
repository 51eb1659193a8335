"""Work that goes on in a thread of its own while the caller computes: reading ahead, writing behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2  # pieces between two threads: one in work, one ready


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items (none of them None), made up to DEPTH ahead; what making one raises, asking for it raises."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, source, None) for _ in range(DEPTH))
        while (item := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, source, None))
            yield item


@contextmanager
def behind(call: Callable[[T], object]) -> Iterator[Callable[[T], None]]:
    """A function that has `call` done later, in order, at most DEPTH calls behind.

    What a call raises, a later one or the end of the block raises.
    """
    pending: deque[Future] = deque()

    def later(item: T) -> None:
        if len(pending) == DEPTH:
            pending.popleft().result()
        pending.append(thread.submit(call, item))

    with ThreadPoolExecutor(1) as thread:
        yield later
        for done in pending:
            done.result()
