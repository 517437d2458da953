# SPDX-License-Identifier: Apache-2.0
"""Real, unmodified llama.cpp programs for tests: where they are, their environment, a server."""

import json
import os
import pathlib
import re
import socket
import subprocess
import time
import urllib.request

import pytest


def from_environment(name):
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set")
    return pathlib.Path(value).resolve()


class Host:
    """One build of llama.cpp."""

    def __init__(self, build):
        self.bin = build / "bin"
        cache = (build / "CMakeCache.txt").read_text()
        self.source = pathlib.Path(re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache, re.M)[1])

    def tool(self, name):
        path = self.bin / name
        if not path.exists():
            pytest.skip(f"{path} is not built")
        return str(path)


def environment(plugin=None, **more):
    """With codes from the first token on, unless a test says otherwise."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TQKV_", "LLAMA_", "GGML_"))}
    env["OMP_WAIT_POLICY"] = "passive"  # threads that spin cost minutes on a busy machine
    env["TQKV_SHORT"] = "0"
    if plugin:
        env["GGML_BACKEND_PATH"] = str(plugin)
        env["LLAMA_ARG_DEVICE"] = "TURBOQUANT0"
    env.update(more)
    return env


class Server:
    def __init__(self, host, model, folder, env, n_ctx=512, n_slots=2, n_threads=1, args=()):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = open(folder / "server.log", "w+")
        self.process = subprocess.Popen(
            [host.tool("llama-server"), "-m", str(model), "-c", str(n_ctx), "-np", str(n_slots),
             "-t", str(n_threads), "--port", str(self.port),
             "--slot-save-path", str(folder), "--no-warmup", *map(str, args)],
            stdout=self.log, stderr=self.log, env=env)
        for _ in range(600):
            try:
                if self.get("/health")["status"] == "ok":
                    return
            except OSError:
                time.sleep(0.1)
            if self.process.poll() is not None:
                break
        self.stop()
        raise AssertionError((folder / "server.log").read_text()[-3000:])

    def get(self, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def answer(self, slot, prompt, n=12):
        return self.get("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot,
                                        "cache_prompt": True})

    def complete(self, slot, prompt, n=12):
        return self.answer(slot, prompt, n)["content"]

    def slot(self, number, action, **body):
        return self.get(f"/slots/{number}?action={action}", body)

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()
