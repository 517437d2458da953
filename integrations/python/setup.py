# SPDX-License-Identifier: Apache-2.0
"""Builds libturboquant with CMake and puts it beside the Python files."""
import pathlib
import subprocess
import tempfile

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parents[2]


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DTQKV_TOOLS=OFF",
                            "-DTQKV_TESTS=OFF", "-DTQKV_INSTALL=OFF"], check=True)
            subprocess.run(["cmake", "--build", folder, "--target", "turboquant_shared", "-j"], check=True)
            library = next(pathlib.Path(folder).rglob("libturboquant.so"))
            self.copy_file(str(library), str(pathlib.Path(self.build_lib) / "turboquant"))


class BinaryDistribution(Distribution):
    """Wheels of this package fit one platform."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithLibrary}, distclass=BinaryDistribution)
