#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes src/kernels/levels.c: the quantiser tables that decide stored bytes.

    gen_levels.py            prints the file
    gen_levels.py --check F  exits with 1 when F differs from what would be printed

Widths 1..6 are Lloyd-Max quantisers of N(0, 1) whose centroids are rounded to an integer grid of
127 steps; width 8 is uniform over +-4. Centroids are rounded to six decimals before anything is
derived from them and powers of two are computed in decimal arithmetic, so that the output does
not depend on the platform's libm.
"""
import decimal
import math
import struct
import sys

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
LEVEL_MAX = 127
RANGE_8 = 4.0
LOOKUP = 64  # levels repeat up to as many, so that bits above a code may be anything
ROUNDS = 3  # thresholds in one bucket of 16 half levels, at most


def pdf(x):
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def tail(x):
    """P(X > x)."""
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def lloyd_max(n):
    """Positive centroids of the symmetric 2n-level quantiser of N(0, 1)."""
    c = [3.0 * (k + 0.5) / n if n > 1 else 0.8 for k in range(n)]
    while True:
        edges = [0.0] + [0.5 * (c[k] + c[k + 1]) for k in range(n - 1)] + [math.inf]
        dens = [pdf(e) for e in edges]
        mass = [tail(e) for e in edges]
        new = [(dens[k] - dens[k + 1]) / (mass[k] - mass[k + 1]) for k in range(n)]
        change = max(abs(a - b) for a, b in zip(c, new))
        c = new
        if change < 1e-12:
            return [round(v, 6) for v in c]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def c_float(x):
    """A float that is exact in f32, as a C constant."""
    m, e = math.frexp(x)
    if x == 0.0:
        return "0.0f"
    digits = "%06x" % int(math.ldexp(m * 2.0 - 1.0, 24))
    return "0x1.%sp%+df" % (digits.rstrip("0") or "0", e - 1)


def power_of_two(numerator, denominator):
    """f32 nearest to 2 ^ (numerator / denominator)."""
    with decimal.localcontext() as context:
        context.prec = 50
        exact = decimal.Decimal(2) ** (decimal.Decimal(numerator) / decimal.Decimal(denominator))
        return f32(float(exact))


def cell_error(lo, hi, level):
    """Integral of (x - level)^2 pdf(x) over lo..hi, 0 <= lo < hi."""
    mass = tail(lo) - tail(hi)
    first = pdf(lo) - pdf(hi)
    second = mass + lo * pdf(lo) - (0.0 if math.isinf(hi) else hi * pdf(hi))
    return second - 2.0 * level * first + level * level * mass


def width(bits):
    """step, positive levels, thresholds in half levels, distortion on N(0, 1)."""
    if bits == 8:
        step = f32(RANGE_8 / LEVEL_MAX)
        levels = list(range(LEVEL_MAX + 1))
    else:
        c = lloyd_max(1 << (bits - 1))
        step = f32(c[-1] / LEVEL_MAX)
        levels = [math.floor(v / step + 0.5) for v in c]
    assert levels[-1] == LEVEL_MAX and len(set(levels)) == len(levels)
    thresholds = [a + b for a, b in zip(levels, levels[1:])]
    edges = [0.0] + [0.5 * k * step for k in thresholds] + [math.inf]
    error = 2.0 * sum(cell_error(edges[m], edges[m + 1], level * step)
                      for m, level in enumerate(levels))
    return step, levels, thresholds, error


def buckets(levels, thresholds):
    """The thresholds again by t // 16, so that sixteen-byte look-ups can find a level.

    Of each bucket: index and level below its first threshold, then for each threshold k inside it
    (k - 1 - 128, what the level grows by there); 127 is never passed, also where t was cut at 255.
    """
    inside = [[k for k in thresholds if k > 16 * b and k < 16 * (b + 1)] for b in range(16)]
    below = [sum(k <= 16 * b for k in thresholds) for b in range(16)]
    assert max(len(ks) for ks in inside) <= ROUNDS
    limits, gains = [], []
    for r in range(ROUNDS):
        limits.append([ks[r] - 129 if r < len(ks) else 127 for ks in inside])
        gains.append([levels[below[b] + r + 1] - levels[below[b] + r] if r < len(ks) else 0
                      for b, ks in enumerate(inside)])
    return below, [levels[m] for m in below], limits, gains


def rows(values, per_line, form):
    out = []
    for i in range(0, len(values), per_line):
        out.append("    " + " ".join(form(v) + "," for v in values[i:i + per_line]))
    return "\n".join(out)


def flat(values):
    return ", ".join("%d" % v for v in values)


def float_table(comment, name, values):
    return "/* %s */\nconst float %s[256] = {\n%s\n};\n" % (comment, name, rows(values, 5, c_float))


def field(name, value):
    return "        .%s = %s,\n" % (name, value)


def array(values):
    return "{\n%s\n        }" % rows(values, 12, str).replace("    ", " " * 12)


def lists(values):
    return "{\n%s        }" % "".join("            {%s},\n" % flat(v) for v in values)


def width_text(bits):
    step, levels, thresholds, error = width(bits)
    below = [-v for v in reversed(levels)]
    if bits == 8:
        below = [-LEVEL_MAX] + below[:-1]
    by_code = below + levels
    return "    [%d] = {\n%s    }," % (
        bits,
        field("step", c_float(step))
        + field("inv_step2", c_float(f32(2.0 / step)))
        + field("inv_peak", c_float(f32(1.0 / f32(step * LEVEL_MAX))))
        + field("distortion", "%.8e" % error)
        + field("n_magnitudes", len(levels))
        + field("levels", array(by_code * max(1, LOOKUP // len(by_code))))
        + field("thresholds", array(thresholds or [0])))


def bucket_text(bits):
    _, levels, thresholds, _ = width(bits)
    index, level, limits, gains = buckets(levels, thresholds)
    return "    [%d] = {\n%s    }," % (
        bits,
        field("index", "{%s}" % flat(index)) + field("level", "{%s}" % flat(level))
        + field("limit", lists(limits)) + field("gain", lists(gains)))


def generate():
    parts = [
        "/* Generated by scripts/gen_levels.py; do not edit. */\n"
        "/* SPDX-License-Identifier: Apache-2.0 */\n"
        "/* clang-format off */\n"
        '#include "kernels/levels.h"\n'
    ]
    parts.append(float_table("2 ^ ((i - 128) / 16); 0 for 0.", "tqkvk_scale_values",
                             [0.0] + [power_of_two(i - 128, 16) for i in range(1, 256)]))
    parts.append(float_table("2 ^ ((128 - i) / 16); 0 for 0.", "tqkvk_scale_inverses",
                             [0.0] + [power_of_two(128 - i, 16) for i in range(1, 256)]))
    parts.append(float_table("2 ^ ((2 i - 257) / 16): halfway between scales i - 1 and i, squared.",
                             "tqkvk_energy_thresholds",
                             [0.0] + [power_of_two(2 * i - 257, 16) for i in range(1, 256)]))
    parts.append(float_table("2 ^ ((2 i - 257) / 32): halfway between scales i - 1 and i.",
                             "tqkvk_peak_thresholds",
                             [0.0] + [power_of_two(2 * i - 257, 32) for i in range(1, 256)]))
    parts.append("/* 16 log2(L / 127) to the nearest whole number; below every scale for 0. */\n"
                 "const int16_t tqkvk_level_octaves[128] = {\n%s\n};\n"
                 % rows([-255] + [round(16 * math.log2(i / LEVEL_MAX)) for i in range(1, LEVEL_MAX + 1)], 16, str))
    parts.append("const tqkvk_width tqkvk_widths[9] = {")
    parts += [width_text(bits) for bits in WIDTHS]
    parts.append("};\n")
    parts.append("const tqkvk_bucket tqkvk_buckets[7] = {")
    parts += [bucket_text(bits) for bits in WIDTHS if 2 <= bits <= 6]
    parts.append("};\n")
    return "\n".join(parts)


def main():
    text = generate()
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        with open(sys.argv[2], encoding="utf-8") as f:
            if f.read() != text:
                print("%s differs from the output of scripts/gen_levels.py" % sys.argv[2])
                return 1
        return 0
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
