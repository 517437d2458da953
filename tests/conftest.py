# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share."""
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def built_library():
    """Points the Python packages at the library of the build under test (TQKV_BUILD_DIR)."""
    folder = os.environ.get("TQKV_BUILD_DIR")
    if not folder or not (ROOT / folder / "lib" / "libturboquant.so").exists():
        pytest.skip("no library; make test builds it")
    if "TQKV_SANITIZE:STRING=\n" not in (ROOT / folder / "CMakeCache.txt").read_text():
        pytest.skip("Python cannot load a library with sanitizers")
    os.environ["TQKV_LIBRARY"] = str(ROOT / folder / "lib" / "libturboquant.so")
