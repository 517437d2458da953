# SPDX-License-Identifier: Apache-2.0
"""Finds and loads libturboquant, and turns its statuses into exceptions."""
import ctypes
import ctypes.util
import functools
import os
import pathlib
import weakref

from . import abi

BESIDE = pathlib.Path(__file__).with_name("libturboquant.so")


class TurboQuantError(RuntimeError):
    """A call of the library that failed. status: number of the tqkv_status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def find():
    """Path of the library: what TQKV_LIBRARY names, the one installed with this package, or the system's."""
    named = os.environ.get("TQKV_LIBRARY")
    if named:
        return named
    found = str(BESIDE) if BESIDE.exists() else ctypes.util.find_library("turboquant")
    if not found:
        raise ImportError("libturboquant.so was not found: install the package with pip, which builds it, "
                          "or name the file in TQKV_LIBRARY")
    return found


@functools.cache
def load():
    """The library, with the types of every public function."""
    lib = ctypes.CDLL(find())
    for name, (result, arguments) in abi.FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def version():
    return load().tqkv_version().decode()


def check(status, what, log=None):
    """Raises TurboQuantError where a call failed. what: what was tried. log: may know more."""
    details = log.take() if log else []
    if status == 0:
        return
    text = f"{what}: {load().tqkv_status_text(status).decode()}"
    if details:
        text += f" ({'; '.join(details)})"
    raise TurboQuantError(status, text)


class Log:
    """Collects what the library says. Must outlive the object it is given to."""

    def __init__(self):
        self._texts = []
        self.struct = abi.Logger(None, abi.WRITE(lambda user, level, text: self._texts.append(text.decode())))

    def take(self):
        """What was said since the last take."""
        texts, self._texts = self._texts, []
        return texts


class Handle:
    """Owns one object of the library, which takes a Handle where it wants the pointer."""

    def __init__(self, pointer, destroy):
        self._as_parameter_ = pointer
        weakref.finalize(self, destroy, pointer)


def address(array):
    """Where a numpy array begins, or None."""
    return None if array is None else array.ctypes.data
