# SPDX-License-Identifier: Apache-2.0
"""Builds libturboquant-cuda with CMake and nvcc, and puts it beside the module.

TQKV_CUDA_ARCHITECTURES narrows the devices that it is built for, such as 90a-real.
"""
import os
import pathlib
import subprocess
import tempfile

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parents[2]


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        devices = os.environ.get("TQKV_CUDA_ARCHITECTURES")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DTQKV_CUDA=ON",
                            "-DTQKV_TOOLS=OFF", "-DTQKV_TESTS=OFF", "-DTQKV_INSTALL=OFF",
                            *([f"-DTQKV_CUDA_ARCHITECTURES={devices}"] if devices else [])], check=True)
            subprocess.run(["cmake", "--build", folder, "--target", "turboquant_cuda_shared", "-j"], check=True)
            library = next(pathlib.Path(folder).rglob("libturboquant-cuda.so"))
            self.copy_file(str(library), self.build_lib)


class BinaryDistribution(Distribution):
    """Wheels of this package fit one platform."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithLibrary}, distclass=BinaryDistribution)
