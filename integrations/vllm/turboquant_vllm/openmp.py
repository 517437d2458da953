# SPDX-License-Identifier: Apache-2.0
"""The threads that the library works on: torch's own, as many as torch uses."""
import ctypes
import functools
import pathlib

import torch
from turboquant import abi


@functools.cache
def n_workers():
    return torch.get_num_threads()


@functools.cache
def parallel():
    """The tqkv_parallel; None where one thread does everything."""
    if n_workers() == 1:
        return None
    # The bridge takes OpenMP from what is loaded (libgomp-....so within torch, or a preloaded libiomp5).
    for path in openmp_libraries():
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    bridge = ctypes.CDLL(str(pathlib.Path(__file__).with_name("libturboquant_openmp.so")))
    return abi.Parallel(n_workers(), n_workers(), ctypes.cast(bridge.turboquant_openmp_run, abi.RUN))


def openmp_libraries():
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    names = ("libiomp5", "libomp", "libgomp")
    return sorted((path for path in paths if pathlib.Path(path).name.startswith(names)),
                  key=lambda path: names.index(next(n for n in names if pathlib.Path(path).name.startswith(n))))[:1]
