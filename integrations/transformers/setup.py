# SPDX-License-Identifier: Apache-2.0
"""Names the binding of the same tree as a dependency, so that one pip command installs both."""
import pathlib

from setuptools import setup

BINDING = pathlib.Path(__file__).resolve().parents[1] / "python"

setup(install_requires=[f"turboquant @ {BINDING.as_uri()}", "torch>=2.6", "transformers>=5.22"])
