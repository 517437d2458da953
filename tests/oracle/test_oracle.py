# SPDX-License-Identifier: Apache-2.0
"""The library against decoder.py, which knows nothing but docs/FORMAT.md.

Random plans are written by plan_writer.py, so reading is compared as well. Seeds: TQKV_ORACLE_SEED
(default 1) is the first of them.
"""
import hashlib
import os
import pathlib
import struct
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import decoder  # noqa: E402
import plan_writer  # noqa: E402
import tqkv_lib  # noqa: E402

SEED = int(os.environ.get("TQKV_ORACLE_SEED", "1"))
SIDES = (decoder.K, decoder.V)
EPSILON = 2.0 ** -23


@pytest.fixture(scope="module")
def lib():
    return tqkv_lib.load()


def heads_of(plan):
    for index, layer in enumerate(plan.layers):
        for side in SIDES:
            for g, head in enumerate(layer.sides[side]):
                yield index, side, g, head


def random_rows(rng, n, dim):
    """Ordinary rows, rows with outliers, rows of every size, and the odd ones."""
    rows = rng.standard_normal((n, dim)) * np.exp(rng.uniform(-2, 2, (n, 1)))
    rows[1::5] *= np.exp(rng.uniform(-8, 8, rows[1::5].shape))
    rows[2::7, rng.integers(dim)] = 300.0
    rows[3::11] *= 10.0 ** rng.uniform(-12, 6)
    rows = rows.astype(np.float32)
    rows[0] = 0.0
    rows[4, 0] = np.nan
    rows[5] = -0.0
    rows[6, dim - 1] = np.inf
    rows[7] = 3e38
    rows[8] = 1e-44
    rows[9] = rows[9].astype(np.float16)
    return rows


@pytest.mark.parametrize("latent", [{}, {"n_kv_heads": 1, "is_latent": True}], ids=["ordinary", "latent"])
@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
def test_plans_are_read_alike(lib, seed, latent):
    data = plan_writer.write_plan(plan_writer.random_plan(seed, **latent))
    plan = decoder.read_plan(data)
    with tqkv_lib.LibraryPlan(lib, data) as library:
        assert library.status == 0, library.texts
        info = library.info()
        assert [info.model.decode(), info.arch.decode(), info.profile.decode()] == plan.names
        assert bytes(info.fingerprint) == plan.fingerprint
        assert (info.n_tiers, info.n_sinks, info.frame_tokens, info.context, info.bits_total) == \
            (plan.n_tiers, plan.n_sinks, plan.frame_tokens, plan.context, plan.bits_total)
        for index, layer in enumerate(plan.layers):
            other = library.layer(index)
            assert (other.n_heads, other.n_kv_heads, other.k_dim, other.v_dim, other.is_latent, other.window) == \
                (layer.n_heads, layer.n_kv_heads, layer.k_dim, layer.v_dim, layer.is_latent, layer.window)
            if layer.rope:
                assert (other.rope.style, other.rope.n_rot) == (layer.rope.style, layer.rope.n_rot)
                assert list(other.tier_tokens)[:plan.n_tiers] == layer.tier_tokens
            for tier in range(plan.n_tiers):
                n_bytes = sum(1 + decoder.row_bytes(h.layouts[tier]) for side in SIDES for h in layer.sides[side])
                assert other.token_bytes[tier] == n_bytes
        for index, side, g, head in heads_of(plan):
            for tier, widths in enumerate(head.layouts):
                assert library.bits(index, g, side, tier, len(widths)) == widths


def test_plans_are_written_alike(lib, tmp_path):
    data = plan_writer.write_plan(plan_writer.random_plan(SEED))
    with tqkv_lib.LibraryPlan(lib, data) as library:
        library.save(tmp_path / "again.tqkv")
    assert (tmp_path / "again.tqkv").read_bytes() == data


@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
def test_rows_are_encoded_alike(lib, seed):
    rng = np.random.default_rng(seed)
    data = plan_writer.write_plan(plan_writer.random_plan(seed))
    plan = decoder.read_plan(data)
    with tqkv_lib.LibraryPlan(lib, data) as library:
        for index, side, g, head in heads_of(plan):
            rows = random_rows(rng, 24, 16 * len(head.layouts[0]))
            tier = int(rng.integers(plan.n_tiers))
            base = int(rng.choice([0, 256, -512, 8192, 2 ** 31 - 256, -2 ** 31]))
            with tqkv_lib.LibraryCodec(library, index) as codec:
                scales, codes, n_bad = codec.encode(g, side, tier, base, rows)
            expected = [decoder.encode_row(plan, index, side, g, tier, base, row) for row in rows]
            where = f"seed {seed}, layer {index}, side {side}, head {g}, tier {tier}, base {base}"
            for i, (scale, bytes_) in enumerate(expected):
                assert (scales[i], codes[i].tobytes()) == (scale, bytes_), f"{where}, row {i}"
            assert n_bad >= 2  # NaN and infinity, and what overflows in the transform


@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
def test_rows_are_decoded_alike(lib, seed):
    """Any bytes, not only those that encoding gives."""
    rng = np.random.default_rng(seed)
    data = plan_writer.write_plan(plan_writer.random_plan(seed))
    plan = decoder.read_plan(data)
    with tqkv_lib.LibraryPlan(lib, data) as library:
        for index, side, g, head in heads_of(plan):
            tier = int(rng.integers(plan.n_tiers))
            base = int(rng.choice([0, 256, -512, 123456789]))
            dim = 16 * len(head.layouts[tier])
            scales = rng.integers(0, 256, 16).astype(np.uint8)
            scales[0] = 0
            codes = rng.integers(0, 256, (16, decoder.row_bytes(head.layouts[tier]))).astype(np.uint8)
            with tqkv_lib.LibraryCodec(library, index) as codec:
                decoded = codec.decode(g, side, tier, base, scales, codes, dim)
            for i in range(16):
                one = codes[i].tobytes()
                expected = decoder.decode_row(plan, index, side, g, tier, base, int(scales[i]), one)
                terms = decoder.decode_bound(plan, index, side, g, tier, int(scales[i]), one)
                assert np.isfinite(decoded[i]).all()
                assert (np.abs(decoded[i] - expected) <= (dim + 4) * EPSILON * terms).all(), \
                    f"seed {seed}, layer {index}, side {side}, head {g}, tier {tier}, base {base}, row {i}"


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_encoding_is_idempotent(lib, seed):
    rng = np.random.default_rng(seed)
    data = plan_writer.write_plan(plan_writer.random_plan(seed))
    plan = decoder.read_plan(data)
    with tqkv_lib.LibraryPlan(lib, data) as library:
        for index, side, g, head in heads_of(plan):
            dim = 16 * len(head.layouts[0])
            rows = random_rows(rng, 200, dim)
            with tqkv_lib.LibraryCodec(library, index) as codec:
                for tier in range(plan.n_tiers):
                    scales, codes, _ = codec.encode(g, side, tier, 256, rows)
                    decoded = codec.decode(g, side, tier, 256, scales, codes, dim)
                    again, codes_again, _ = codec.encode(g, side, tier, 256, decoded)
                    changed = np.flatnonzero((again != scales) | (codes_again != codes).any(1))
                    assert len(changed) == 0, \
                        f"seed {seed}, layer {index}, side {side}, head {g}, tier {tier}, rows {changed}"


def test_blocks_of_every_width_hold_every_code():
    """decoder.py itself: packing and unpacking are inverse and use every bit once."""
    rng = np.random.default_rng(SEED)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        codes = [int(code) for code in rng.integers(0, 1 << bits, 16)]
        assert decoder.unpack_unit(decoder.pack_unit(codes, bits), bits) == codes
        full = decoder.pack_unit([(1 << bits) - 1] * 16, bits)
        assert full == b"\xff" * (2 * bits)


def repaired(data):
    data = data[:16] + struct.pack("<Q", len(data)) + data[24:]
    return data[:24] + hashlib.sha256(data[:24] + data[56:]).digest() + data[56:]


def test_damage_is_judged_alike(lib):
    """Where decoder.py finds a fault behind a right fingerprint, so does the library (which checks more)."""
    rng = np.random.default_rng(SEED)
    data = plan_writer.write_plan(plan_writer.random_plan(SEED, dims=(16, 16), n_kv_heads=1))
    n_refused = 0
    for _ in range(300):
        at = int(rng.integers(56, 600))
        damaged = repaired(data[:at] + bytes([int(rng.integers(256))]) + data[at + 1:])
        try:
            decoder.read_plan(damaged)
            refused = False
        except (decoder.FormatError, UnicodeDecodeError):
            refused = True
        with tqkv_lib.LibraryPlan(lib, damaged) as library:
            assert library.status in (0, 4)
            if refused:
                assert library.status == 4
            n_refused += refused
    assert n_refused > 20


def golden_cases(data):
    at = 0
    while at < len(data):
        case = dict(zip(("layer", "side", "head", "tier", "base", "n", "dim", "row_bytes"),
                        struct.unpack_from("<4Ii3I", data, at)))
        at += 32
        n, n_floats, n_codes = case["n"], case["n"] * case["dim"], case["n"] * case["row_bytes"]
        case["rows"] = np.frombuffer(data, "<f4", n_floats, at).reshape(n, -1)
        case["scales"] = np.frombuffer(data, "u1", n, at + 4 * n_floats)
        at += 4 * n_floats + n
        case["codes"] = [data[at + i * case["row_bytes"]:at + (i + 1) * case["row_bytes"]] for i in range(n)]
        case["decoded"] = np.frombuffer(data, "<f4", n_floats, at + n_codes).reshape(n, -1)
        at += n_codes + 4 * n_floats
        yield case


def test_golden_rows_are_what_the_page_says():
    golden = tqkv_lib.ROOT / "tests" / "golden" / "v0"
    plan = decoder.read_plan((golden / "plan.tqkv").read_bytes())
    for case in golden_cases((golden / "rows.bin").read_bytes()):
        place = (plan, case["layer"], case["side"], case["head"], case["tier"])
        for i in range(case["n"]):
            scale, codes = int(case["scales"][i]), case["codes"][i]
            assert decoder.encode_row(*place, case["base"], case["rows"][i]) == (scale, codes)
            decoded = decoder.decode_row(*place, case["base"], scale, codes)
            bound = (case["dim"] + 4) * EPSILON * decoder.decode_bound(*place, scale, codes)
            assert (np.abs(decoded - case["decoded"][i]) <= bound).all()


def test_exported_cells_are_records(lib):
    """What a store exports is read from the page, and is what the store reads itself."""
    rng = np.random.default_rng(SEED)
    data = plan_writer.write_plan(plan_writer.random_plan(SEED, n_tiers=2))
    plan = decoder.read_plan(data)
    n_cells = 96  # past the first tier, so that some tokens have aged
    with tqkv_lib.LibraryPlan(lib, data) as library:
        shape = plan.layers[0]
        rows = [rng.standard_normal((n_cells, shape.n_kv_heads * dim)).astype(np.float32)
                for dim in (shape.k_dim, shape.v_dim)]
        with tqkv_lib.LibraryStore(library, 0, n_cells) as store:
            store.append(0, rows)
            tiers = set()
            for cell in range(n_cells):
                for side in SIDES:
                    record = decoder.read_record(plan, store.export(cell, side))
                    assert (record.side, record.layer) == (side, 0)
                    assert record.base == (0 if side else cell // plan.frame_tokens * plan.frame_tokens)
                    tiers.add((record.tier, record.sink))
                    dim = (shape.k_dim, shape.v_dim)[side]
                    row = store.read(cell, side, shape.n_kv_heads * dim)
                    for g, (scale, codes) in enumerate(record.rows):
                        place = (plan, 0, side, g, record.tier)
                        decoded = decoder.decode_row(*place, record.base, scale, codes)
                        bound = (dim + 4) * EPSILON * decoder.decode_bound(*place, scale, codes)
                        assert (np.abs(row[g * dim:(g + 1) * dim] - decoded) <= bound).all()
            assert tiers == {(0, 1), (0, 0), (1, 0)}
