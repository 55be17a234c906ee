"""Work shared among processes, its results in order, never more than a few jobs ahead.

for faults in processes.in_order(radiographs.find_faults, jobs, count=4): ...
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from workbench import WorkbenchError


def in_order(function: Callable, jobs: Iterable[tuple], *, count: int) -> Iterator[Any]:
    """What `function(*job)` returns for each job, in order; two jobs a process are ahead at most, so memory is bounded.

    Args:
        function: of a module that is quickly imported, since every process imports it.
        jobs: its arguments.
        count: of processes; with one, or fewer, this process does it all.

    Raises:
        WorkbenchError: a process was killed. What `function` raises is raised here.
    """
    if count <= 1:
        yield from (function(*job) for job in jobs)
        return
    # Spawned, not forked: a fork of a process that runs TensorFlow's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        pending: deque = deque()
        waiting = iter(jobs)
        try:
            while True:
                while len(pending) < 2 * count and (job := next(waiting, None)):
                    pending.append(pool.submit(function, *job))
                if not pending:
                    return
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise WorkbenchError(
                "a process that decodes images was killed, perhaps for lack of memory: use fewer processes, "
                "and call again; what is finished is kept."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
