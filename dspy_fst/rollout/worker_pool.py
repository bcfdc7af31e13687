"""Many jobs on a few daemon threads, none of which is waited for longer than its time limit.

Not a ThreadPoolExecutor: that one cannot give up a stuck job, and joins it when the interpreter exits.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run_all(
    jobs: Sequence[Callable[[], T]],
    *,
    threads: int,
    timeout_s: float,
    on_timeout: Callable[[int], T],
    in_flight: Callable[[int], None] = lambda count: None,
    on_result: Callable[[T], None] = lambda result: None,
    queued_s: Callable[[int], float] = lambda index: 0.0,
) -> list[T]:
    """Run every job and return the results in the order of the jobs.

    Args:
        timeout_s: Seconds a job may run; then its result is ``on_timeout(index)``, its thread is left behind
            and another takes its place.
        in_flight: Told how many jobs are running or about to, before the start and at each end.
        on_result: Called in this thread for each result as it comes.
        queued_s: Seconds that a job has waited for its turn elsewhere; they do not count towards ``timeout_s``.

    Raises:
        Exception: the first exception that a job let through; jobs not yet started are dropped.
    """
    todo = deque(range(len(jobs)))
    started: dict[int, float] = {}
    ended: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    lock = threading.Lock()
    left = len(jobs)

    def work() -> None:
        nonlocal left
        while True:
            with lock:
                if not todo:
                    return
                index = todo.popleft()
                started[index] = time.monotonic()
            try:
                outcome: tuple[int, T | None, BaseException | None] = (index, jobs[index](), None)
            except BaseException as error:
                outcome = (index, None, error)
            with lock:
                if started.pop(index, None) is None:
                    return  # given up meanwhile; a replacement runs in this thread's place
                left -= 1
                in_flight(min(left, threads))
            ended.put(outcome)

    def start_worker() -> None:
        threading.Thread(target=work, name="rollout", daemon=True).start()

    def give_up_overdue() -> list[int]:
        nonlocal left
        with lock:
            overdue = [i for i, since in started.items() if time.monotonic() - since - queued_s(i) > timeout_s]
            for index in overdue:
                del started[index]
                left -= 1
            if overdue:
                in_flight(min(left, threads))
        return overdue

    results: dict[int, T] = {}
    in_flight(min(left, threads))
    for _ in range(min(threads, len(jobs))):
        start_worker()
    try:
        while len(results) < len(jobs):
            try:
                index, result, error = ended.get(timeout=min(1.0, timeout_s / 4))
            except queue.Empty:
                pass
            else:
                if error is not None:
                    raise error
                results[index] = result  # type: ignore[assignment]
                on_result(results[index])
            for late in give_up_overdue():
                results[late] = on_timeout(late)
                on_result(results[late])
                start_worker()
    finally:
        with lock:
            todo.clear()
        in_flight(0)
    return [results[index] for index in range(len(jobs))]
