"""Many small jobs for a few threads, of which only a few are ever submitted.

A future costs a kilobyte: one for each of a large model's tensors would be memory that grows with
it. And after an exception only what is running has to end.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING = 2  # for each thread, so that none is idle between two jobs


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """The results of `function` for all items, `workers` at once, in the order in which they end.

    Raises the first exception that a call raises.
    """
    running: set[Future[Result]] = set()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                running.add(pool.submit(function, item))
                if len(running) == _WAITING * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(running))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
