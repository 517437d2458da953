# SPDX-License-Identifier: Apache-2.0
"""Threads for the library, which starts none of its own."""
import itertools
from concurrent.futures import ThreadPoolExecutor

from . import abi


class Workers:
    """n threads, the calling one included. Python lets go of its lock while the library works."""

    def __init__(self, n):
        self.n = n
        self._pool = ThreadPoolExecutor(max(n - 1, 1), thread_name_prefix="turboquant")
        self.struct = abi.Parallel(None, n, abi.RUN(self._run))

    def _run(self, _user, n_tasks, task, argument):
        indices = itertools.count()

        def work(worker):
            while (i := next(indices)) < n_tasks:
                task(argument, i, worker)

        others = [self._pool.submit(work, worker) for worker in range(1, min(self.n, n_tasks))]
        work(0)
        for other in others:
            other.result()


def parallel(workers):
    """The tqkv_parallel of Workers; None stays None: one after another on the calling thread."""
    return None if workers is None else workers.struct
