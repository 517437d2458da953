#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a Python environment with vLLM's CPU build and the plugin, in the cache folder.

    scripts/vllm_env.py

Prints its Python. 2.5 GB and two minutes, done once; the plugin and the binding it stands on are installed anew each
time. Only `make test-full` asks for it.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys

import fetch

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "integrations" / "vllm"
BINDING = ROOT / "integrations" / "python"
REQUIREMENTS = PLUGIN / "test" / "vllm-requirements.txt"


def main():
    folder = fetch.cache_dir() / "vllm-venv"
    done = folder / "turboquant.done"
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not done.exists() or done.read_text() != wanted:
        print(f"vllm_env: making {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, "--no-deps", "-r", REQUIREMENTS], check=True, stdout=sys.stderr)
        done.write_text(wanted)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", BINDING, PLUGIN], check=True, stdout=sys.stderr)
    print(python)


if __name__ == "__main__":
    main()
