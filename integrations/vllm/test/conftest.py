# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM in the environment whose Python TQKV_TEST_VLLM names; scripts/vllm_env.py makes one."""
import json
import os
import pathlib
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
       "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


class Python:
    """The interpreter of the environment. plan: value of TQKV_PLAN, or None for vLLM as it is."""

    def __init__(self, path):
        self.path = path

    def run(self, arguments, plan=None, n_ranks=1):
        env = {name: value for name, value in os.environ.items() if name not in ("TQKV_PLAN", "PYTHONPATH")} | ENV
        if n_ranks > 1:
            cpus = sorted(os.sched_getaffinity(0))
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cpus[rank % len(cpus)]) for rank in range(n_ranks))
        if plan:
            env["TQKV_PLAN"] = str(plan)
        return subprocess.run([self.path, *map(str, arguments)], env=env, cwd=HERE, capture_output=True, text=True,
                              timeout=3600, check=False)

    def serve(self, plan, jobs, n_ranks=1):
        """What run_engine.py prints for jobs (by name), and the log of them all."""
        got = self.run(["run_engine.py", json.dumps(list(jobs.values()))], plan, n_ranks)
        assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-4000:]
        printed = [line for line in got.stdout.splitlines() if line.startswith("[{")]  # ranks may say more after it
        return dict(zip(jobs, json.loads(printed[-1]))) | {"log": got.stdout + got.stderr}

    def make_checkpoint(self, folder, kind, window=None):
        """Here, as this environment has torch; that of the tests may not."""
        got = self.run(["-c", "import pathlib, sys, tiny_checkpoint as t; "
                              "t.make(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None)",
                        folder, kind, window or 0])
        assert got.returncode == 0, got.stderr
        return str(folder)


@pytest.fixture(scope="session")
def interpreter():
    return Python


@pytest.fixture(scope="session")
def python():
    path = os.environ.get("TQKV_TEST_VLLM")
    if not path:
        pytest.skip("needs vLLM; make test-full has it")
    return Python(path)


@pytest.fixture(scope="session")
def checkpoint(python, tmp_path_factory):
    def make(kind, window=None):
        return python.make_checkpoint(tmp_path_factory.mktemp(kind), kind, window)
    return make
