#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Kernels of this CPU, then whole-model decoding at two depths. Usage: bench/run.sh BUILD_DIR [DEPTH...]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=$1
shift
depths=${*:-512 4096}
model=$(python3 "$root/scripts/fetch.py" smollm2)
text=$(python3 "$root/scripts/fetch.py" texts)/eval/en.txt
plan=$build/bench.tqkv

grep -m 1 'model name' /proc/cpuinfo || true
"$build/bin/test_kernels" --bench
"$build/bin/test_tiles" --bench
"$build/bin/test_blocks" --bench
"$build/bin/test_decode" --bench
test -e "$plan" || "$build/bin/tqkv" calibrate "$model" -o "$plan"
for depth in $depths; do
    "$build/bin/tqkv" eval "$model" --plan "$plan" --text "$text" --speed-only --quick-fill --depth "$depth"
done
