# SPDX-License-Identifier: Apache-2.0
"""Wrote tests/golden/v0 and tests/fuzz/corpus. Run once for each format version, never again for an old one:

    TQKV_TEST_LIB=build/dev/lib/libturboquant.so python3 tests/golden/make_golden.py

v0/plan.tqkv    a small plan: RoPE of both styles, a layer without a cache, a plain head
v0/rows.bin     rows for it; for each case
                    u32 layer, side, head, tier; i32 base; u32 n_rows, dim, row_bytes
                    f32[n_rows][dim] input, u8[n_rows] scales, u8[n_rows][row_bytes] codes, f32[n_rows][dim] decoded
v0/refused/S-X  files that must be refused with status S ("corrupt" or "version")
"""
import hashlib
import pathlib
import struct
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "oracle"))

import decoder  # noqa: E402
import plan_writer  # noqa: E402
import tqkv_lib  # noqa: E402

SEED = 2026
N_ROWS = 6


def golden_rows(lib, data):
    rng = np.random.default_rng(SEED)
    plan = decoder.read_plan(data)
    out = b""
    with tqkv_lib.LibraryPlan(lib, data) as library:
        for index, layer in enumerate(plan.layers):
            for side in (decoder.K, decoder.V):
                for g, head in enumerate(layer.sides[side]):
                    for tier, widths in enumerate(head.layouts):
                        base = [0, 768][tier % 2]
                        dim, n_bytes = 16 * len(widths), decoder.row_bytes(widths)
                        rows = rng.standard_normal((N_ROWS, dim)) * np.exp(rng.uniform(-2, 2, (N_ROWS, 1)))
                        rows = rows.astype(np.float32)
                        rows[0] = 0.0
                        rows[1, dim // 2] = 100.0
                        rows[2, 3] = np.nan
                        with tqkv_lib.LibraryCodec(library, index) as codec:
                            scales, codes, _ = codec.encode(g, side, tier, base, rows)
                            decoded = codec.decode(g, side, tier, base, scales, codes, dim)
                        out += struct.pack("<4Ii3I", index, side, g, tier, base, N_ROWS, dim, n_bytes)
                        out += rows.astype("<f4").tobytes() + scales.tobytes() + codes.tobytes()
                        out += decoded.astype("<f4").tobytes()
    return out


def repaired(data):
    data = data[:16] + struct.pack("<Q", len(data)) + data[24:]
    return data[:24] + hashlib.sha256(data[:24] + data[56:]).digest() + data[56:]


def put(data, at, new):
    return data[:at] + new + data[at + len(new):]


def tiny_plan():
    plan = plan_writer.random_plan(SEED, dims=(16, 16), n_layers=1, n_kv_heads=1, n_tiers=2)
    head = {"layouts": [[8], [3]], "mean": np.zeros(16, np.float32), "weight": np.ones(1, np.float32),
            "matrix": np.eye(16)}
    plan["layers"][0]["sides"] = [[head], [dict(head, layouts=[[6], [2]])]]
    plan["names"] = ["tiny", "arch", "test"]
    return plan_writer.write_plan(plan)


def latent(data):
    """tiny_plan with a latent layer: bit 31 of v_dim."""
    at = data.index(struct.pack("<4I", 1, 2, 16, 16), 96) + 12
    return repaired(put(data, at, struct.pack("<I", 16 | 1 << 31)))


def refused(data):
    """File name to content; data: of tiny_plan."""
    names = 96
    ropes = names + 2 + 4 + 2 + 4 + 2 + 4
    layouts = ropes + 8 + 8 * 4
    layers = layouts + 4 * 3
    heads = layers + 24 + 8
    mean, weight = heads + 8, heads + 8 + 64
    exponents, transform = weight + 4, weight + 4 + 16
    assert len(data) == transform + 512 + 8 + 64 + 4 + 16 + 512
    u32 = struct.Struct("<I").pack
    return {
        "corrupt-empty": b"",
        "corrupt-foreign": b"GGUF\x03\x00\x00\x00" + bytes(88),
        "corrupt-header-only": data[:96],
        "corrupt-truncated": data[:-1],
        "corrupt-flipped": put(data, transform + 77, bytes([data[transform + 77] ^ 4])),
        "corrupt-text-mode": data.replace(b"\r\n", b"\n", 1),
        "corrupt-trailing": repaired(data + b"\x00"),
        "corrupt-cut-and-sealed": repaired(data[:-100]),
        "corrupt-many-layers": repaired(put(data, 56, u32(4096))),
        "corrupt-many-layouts": repaired(put(data, 80, u32(0xffffffff))),
        "corrupt-name": repaired(put(data, names + 2, b"\xff")),
        "corrupt-frequency": repaired(put(data, ropes + 8, u32(0x7fc00000))),
        "corrupt-width": repaired(put(data, layouts + 2, b"\x07")),
        "corrupt-layout-order": repaired(put(data, layouts + 2, b"\x04")),
        "corrupt-dim": repaired(put(data, layers + 8, u32(24))),
        "corrupt-heads": repaired(put(data, layers, u32(0x10000))),
        "corrupt-last-tier": repaired(put(data, layers + 28, u32(16))),
        "corrupt-layout-number": repaired(put(data, heads, u32(4))),
        "corrupt-mean": repaired(put(data, mean, u32(0x7f800000))),
        "corrupt-weight": repaired(put(data, weight, u32(0xbf800000))),
        "corrupt-exponent": repaired(put(data, exponents, b"\x7f")),
        "corrupt-transform": repaired(put(data, transform + 2, b"\x00\x7c")),
        "corrupt-not-canonical": repaired(put(data, transform, b"\x00\x7b")),
        "version-1": put(data, 8, u32(1)),
        "version-damaged": put(data, 11, b"\x80"),
    }


def record(plan, side, tier, rows):
    """A record of layer 0; rows: bytes of (scale, row) of the heads."""
    data = bytes.fromhex("54 7e 51 4b") + struct.pack("<4B2Hi", 0, side, tier, 0, 1, 0, 256 if side == 0 else 0)
    data += plan.fingerprint[:8] + struct.pack("<I", 32 + len(rows)) + rows
    return data + hashlib.sha256(data).digest()[:4]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main():
    folder, corpus = HERE / "v0", HERE.parent / "fuzz" / "corpus"
    if (folder / "plan.tqkv").exists():
        sys.exit(f"{folder} exists: golden files are never written again")
    data = plan_writer.write_plan(plan_writer.random_plan(SEED, dims=(32, 16), n_kv_heads=1, n_tiers=2))
    tiny = tiny_plan()
    plan = decoder.read_plan(tiny)
    write(folder / "plan.tqkv", data)
    write(folder / "rows.bin", golden_rows(tqkv_lib.load(), data))
    for name, content in refused(tiny).items():
        write(folder / "refused" / name, content)
        write(corpus / "plan" / name, content)
    write(folder / "tiny.tqkv", tiny)
    write(corpus / "plan" / "tiny", tiny)
    write(corpus / "plan" / "latent", latent(tiny))
    for side, tier, n_bytes in ((0, 0, 16), (0, 1, 6), (1, 0, 12), (1, 1, 4)):
        write(corpus / "record" / f"tiny-{side}-{tier}", record(plan, side, tier, b"\x80" + bytes(range(n_bytes))))


if __name__ == "__main__":
    main()
