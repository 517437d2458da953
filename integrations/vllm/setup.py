# SPDX-License-Identifier: Apache-2.0
"""Builds the C libraries with CMake and puts them into the package, which is otherwise pure Python."""
import pathlib
import shutil
import subprocess
import tempfile

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent


class BuildWithLibraries(build_py):
    def run(self):
        super().run()
        target = (HERE if self.editable_mode else pathlib.Path(self.build_lib)) / "turboquant_vllm"
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cmake", "-S", HERE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"], check=True)
            subprocess.run(["cmake", "--build", folder, "--parallel", "--target", "turboquant_shared",
                            "turboquant_openmp"], check=True)
            for library in (pathlib.Path(folder).rglob("libturboquant*.so")):
                shutil.copy(library, target / library.name)


class PlatformWheel(bdist_wheel):
    """Any Python, this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
