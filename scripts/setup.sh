#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# setup.sh [test]: makes a bare Debian 12 ready to build: Debian packages, then a Python environment with
# the versions pinned in requirements.txt; with `test` also the host of integrations/transformers. Does
# nothing, fast, when all is there.
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

# Installs requirements once for each state of the file; the stamp is the file's hash.
install_once() {
    stamp="$cache/venv/$(basename "$1").done"
    wanted=$(sha256sum <"$1" | cut -d ' ' -f 1)
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        echo "setup: installing $(basename "$1") in $cache/venv" >&2
        mkdir -p "$cache"
        test -x "$cache/venv/bin/python" || python3 -m venv "$cache/venv"
        pip="$cache/venv/bin/python -m pip install -q --disable-pip-version-check"
        torch=$(grep '^torch==' "$1" || true)
        test -z "$torch" || $pip "$torch" # alone, so that the index says which build: plain or for a GPU
        $pip -r "$1"
        echo "$wanted" >"$stamp"
    fi
}

install_once "$root/requirements.txt"
test "${1-}" != test || install_once "$root/tests/transformers/requirements-transformers.txt"
