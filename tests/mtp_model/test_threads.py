"""Jobs in flight: every result, few at a time, and an end after the first failure."""

import threading
from collections.abc import Iterator

import pytest

from mtp_model.threads import in_threads

WORKERS = 3
MOST = 2 * WORKERS


def test_every_result_and_none_for_no_job():
    assert sorted(in_threads(lambda number: number**2, range(100), WORKERS)) == [
        number**2 for number in range(100)
    ]
    assert list(in_threads(abs, [], WORKERS)) == []


def test_jobs_are_taken_as_others_end():
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    for ended, _ in enumerate(in_threads(abs, numbers(), WORKERS)):
        assert taken - ended <= MOST
    assert taken == 100


def test_jobs_run_at_the_same_time():
    all_there = threading.Barrier(WORKERS, timeout=10)
    assert sorted(in_threads(lambda _: all_there.wait(), range(WORKERS), WORKERS)) == [0, 1, 2]


def test_after_a_failure_no_job_begins_that_was_not_submitted():
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise KeyError(number)

    with pytest.raises(KeyError):
        list(in_threads(fail, range(100), WORKERS))
    assert len(begun) <= MOST
