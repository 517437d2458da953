#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes a bare Debian 12 ready to build and test: Debian packages, then a Python environment with
# the versions pinned in requirements.txt and tests/transformers/requirements-transformers.txt. Does nothing,
# fast, when all is there.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${TQKV_CACHE:-$HOME/.cache/turboquant}
packages="gcc g++ make cmake ninja-build pkg-config binutils bsdextrautils python3 python3-venv python3-pip
    libcmocka-dev libjansson-dev"
if [ "$(uname -m)" = x86_64 ]; then # kernels of aarch64 are tested by qemu
    packages="$packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
fi

missing_packages() {
    if ! command -v dpkg-query >/dev/null; then
        return # not Debian: the configure step names what it does not find
    fi
    for package in $packages; do
        case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true) in
        *"ok installed") ;;
        *) printf '%s ' "$package" ;;
        esac
    done
}

missing=$(missing_packages)
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "setup: Debian packages are missing. Type this, then try again:" >&2
        echo "    sudo apt-get update && sudo apt-get install -y $missing" >&2
        exit 1
    fi
    echo "setup: installing $missing" >&2
    export DEBIAN_FRONTEND=noninteractive
    # Package lists may be absent (a bare image) or old (a version that is no longer served).
    # shellcheck disable=SC2086
    apt-get -q install -y --no-install-recommends $missing >/dev/null 2>&1 || {
        apt-get -q update >/dev/null
        apt-get -q install -y --no-install-recommends $missing >/dev/null
    }
fi

models="$root/tests/transformers/requirements-transformers.txt"
wanted=$(cat "$root/requirements.txt" "$models" | sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$cache/venv/turboquant.done" 2>/dev/null || true)" != "$wanted" ]; then
    echo "setup: making the Python environment in $cache/venv" >&2
    mkdir -p "$cache"
    rm -rf "$cache/venv"
    python3 -m venv "$cache/venv"
    pip="$cache/venv/bin/python -m pip install -q --disable-pip-version-check"
    $pip "$(grep '^torch==' "$models")" # alone, so that the index says which build: plain or for a GPU
    $pip -r "$root/requirements.txt" -r "$models"
    echo "$wanted" >"$cache/venv/turboquant.done"
fi
