#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the pinned, unmodified llama.cpp that tests, demo and benchmarks run against.

    scripts/build_llama.py [api3] [api2] [--stage lib|tools|server]

Prints the build folder of each version named (default: api3). Sources come from
fetch.py; the build lives in the cache folder, is done once, and goes on where an
interrupted call stopped. Stages build on each other:

    lib      ggml and libllama, about two minutes on two cores
    tools    + llama-completion, llama-bench, llama-perplexity
    server   + llama-server (the default)

The two builds differ on purpose, as the builds that users have differ: api3 is the
newest llama.cpp with OpenMP, api2 an older one with ggml's own thread pool.
"""

import argparse
import fcntl
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import fetch

COMMON_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_APP=OFF",
]
# Some virtual machines list AMX and trap on its first instruction. Nothing here is about that unit.
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
if platform.machine() == "x86_64":
    COMMON_OPTIONS += [f"-DCMAKE_C_FLAGS={WITHOUT_AMX}", f"-DCMAKE_CXX_FLAGS={WITHOUT_AMX}"]
OPTIONS = {"api3": ["-DGGML_OPENMP=ON"], "api2": ["-DGGML_OPENMP=OFF"]}
STAGES = {
    "lib": ["llama"],
    "tools": ["llama-completion", "llama-bench", "llama-perplexity"],
    "server": ["llama-server"],
}


def say(text):
    print(f"build_llama: {text}", file=sys.stderr, flush=True)


def cpu_flags():
    """What GGML_NATIVE looks at: a cache that moved to another CPU must be rebuilt."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return platform.machine() + (found.group(1) if found else "")


def settings_text(version):
    flags = hashlib.sha256(cpu_flags().encode()).hexdigest()[:12]
    return "\n".join(COMMON_OPTIONS + OPTIONS[version] + [f"cpu {flags}"]) + "\n"


def build_dir(version):
    name = f"llama-{version}"
    return fetch.cache_dir() / "build" / f"{name}-{fetch.pin_hash(fetch.pins()[name])}"


def run(command, log_path):
    """Runs a build command; shows ninja's counter about every ten seconds."""
    shown = 0.0
    with open(log_path, "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace")
        for line in process.stdout:
            log.write(line)
            if line.startswith("[") and time.monotonic() - shown > 10:
                shown = time.monotonic()
                say(line.rstrip()[:100])
    if process.wait() != 0:
        tail = log_path.read_text(errors="replace").splitlines()[-25:]
        sys.exit("\n".join(tail) + f"\nbuild_llama: failed; the whole log is {log_path}")


def build(version, last_stage, jobs):
    folder = build_dir(version)
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_text(version)
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings_path = folder / "turboquant-settings.txt"
        if not settings_path.exists() or settings_path.read_text() != settings:
            shutil.rmtree(folder)
            folder.mkdir()
        for stage, targets in STAGES.items():
            stamp = folder / f"turboquant-{stage}.done"
            if not stamp.exists():
                build_stage(version, folder, targets, jobs)
                settings_path.write_text(settings)
                stamp.touch()
            if stage == last_stage:
                break
    return folder


def build_stage(version, folder, targets, jobs):
    started = time.monotonic()
    log_path = folder.with_name(f"{folder.name}.log")
    if not (folder / "build.ninja").exists():
        source = fetch.fetch(f"llama-{version}")
        say(f"{version}: configuring")
        run(["cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja",
             *COMMON_OPTIONS, *OPTIONS[version]], log_path)
    say(f"{version}: building {' '.join(targets)}")
    run(["cmake", "--build", str(folder), "-j", str(jobs), "--target", *targets], log_path)
    say(f"{version}: {' '.join(targets)} done in {time.monotonic() - started:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="api3, api2")
    parser.add_argument("--stage", choices=list(STAGES), default="server")
    parser.add_argument("--where", action="store_true", help="print the folders, build nothing")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    for version in args.versions or ["api3"]:
        if version not in OPTIONS:
            parser.error(f"versions are: {' '.join(OPTIONS)}")
        if args.where:
            print(build_dir(version))
        else:
            print(build(version, args.stage, args.jobs), flush=True)


if __name__ == "__main__":
    main()
