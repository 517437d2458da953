# SPDX-License-Identifier: Apache-2.0
"""The ctypes binding against the headers, and against arithmetic that numpy can do."""
import ctypes
import pathlib
import re

import numpy as np
import pytest

import turboquant
from turboquant import abi, library
from turboquant.plan import Side

pytestmark = pytest.mark.usefixtures("built_library")
ROOT = pathlib.Path(__file__).resolve().parents[2]
ROPE = turboquant.Rope(turboquant.RopeStyle.HALVES, np.array([1, 0.5, 0.25, 0.125], np.float32))
SHAPE = turboquant.PlanLayer(n_heads=4, n_kv_heads=2, k_dim=32, v_dim=16, rope=ROPE)


def declarations():
    """name: number of arguments of every function that the headers of this binding declare."""
    found = {}
    for header in (ROOT / "include" / "turboquant").glob("*.h"):
        if header.name == "cuda.h":
            continue  # of another library (integrations/cuda)
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        for name, arguments in re.findall(r"^TQKV_API\b[^;{]*?\b(tqkv_\w+)\(([^;{]*)\);", text, re.MULTILINE):
            found[name] = 0 if arguments.strip() == "void" else arguments.count(",") + 1
    return found


def test_binding_has_every_public_function():
    assert {name: len(arguments) for name, (_, arguments) in abi.FUNCTIONS.items()} == declarations()


@pytest.mark.parametrize("init, kind", [("tqkv_store_config_init", abi.StoreConfig),
                                        ("tqkv_attend_args_init", abi.AttendArgs),
                                        ("tqkv_paged_config_init", abi.PagedConfig),
                                        ("tqkv_paged_batch_init", abi.PagedBatch),
                                        ("tqkv_calib_config_init", abi.CalibConfig)])
def test_structures_have_the_size_of_the_library(init, kind):
    struct = kind()
    getattr(library.load(), init)(struct)
    assert struct.struct_bytes == ctypes.sizeof(kind)


def test_profile_has_the_size_of_the_library():
    struct = abi.Profile()
    library.load().tqkv_profile_init(struct, b"5x", 3.2, 8192)
    assert (struct.struct_bytes, struct.name, struct.bits_total, struct.context) == \
        (ctypes.sizeof(abi.Profile), b"5x", 3.2, 8192)


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2, 32), np.float32), rng.standard_normal((n, 2, 16), np.float32)


def filled(n, n_streams=2, stream=1):
    store, batch = turboquant.Store(turboquant.Plan.builtin(turboquant.Builtin.F16, SHAPE), 0, 64, n_streams), \
        turboquant.Batch()
    k, v = rows(n)
    batch.begin(store, np.arange(n, dtype=np.int64) + 64 * stream, np.arange(n, dtype=np.int32))
    batch.put(Side.K, k)
    batch.put(Side.V, v)
    return store, batch, k, v


def expected_attention(q, k, v, scale):
    """Causal; q: [n][4][32]."""
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("n_workers", [None, 3])
def test_attention_over_a_batch(n_workers):
    store, batch, k, v = filled(40)
    q = np.random.default_rng(1).standard_normal((40, 4, 32), np.float32)
    out = np.full((40, 4, 16), np.nan, np.float32)
    workers = turboquant.Workers(n_workers) if n_workers else None
    store.attend(batch, q, out, 40, stream=1, causal=True, scale=0.2, workers=workers)
    np.testing.assert_allclose(out, expected_attention(q, k, v, 0.2), atol=1e-5)
    batch.commit(workers)
    assert (store.read(range(64, 104), Side.K) == k.astype(np.float16)).all()
    assert store.stats().n_written == 40


def test_streams_are_copied_and_records_restored():
    store, batch, _, v = filled(20)
    batch.commit()
    store.copy_stream(0, store, 1)
    assert (store.read(range(20), Side.V) == v.astype(np.float16)).all()
    other = turboquant.Store(store.plan, 0, 64)
    for side in Side:
        other.restore(5, side, store.export(69, side))
        assert other.export(5, side) == store.export(69, side)


def test_codec_round_trip():
    codec = turboquant.Codec(turboquant.Plan.builtin(turboquant.Builtin.Q8, SHAPE), 0)
    k = rows(10)[0][:, 1]
    scales, codes, n_bad = codec.encode(1, Side.K, 0, 0, k)
    back = np.full((10, 32), np.nan, np.float32)
    codec.decode(1, Side.K, 0, 0, scales, codes, back)
    assert n_bad == 0 and np.abs(back - k).max() < 0.05 and (back != k).any()


def test_plan_file_round_trip(tmp_path):
    plan = turboquant.Plan.builtin(turboquant.Builtin.Q8, SHAPE)
    plan.save(tmp_path / "q8.tqkv")
    back = turboquant.Plan.load(tmp_path / "q8.tqkv")
    assert (back.fingerprint, back.n_layers, back.profile) == (plan.fingerprint, 1, "q8")
    layer = back.layer(0)
    assert (layer.n_heads, layer.n_kv_heads, layer.k_dim, layer.v_dim) == (4, 2, 32, 16)
    assert list(layer.rope.inv_freq) == [1, 0.5, 0.25, 0.125]
    assert list(back.bits(0, 0, Side.V, 0)) == [8]


def test_calibration_makes_a_plan():
    workers = turboquant.Workers(2)
    calib = turboquant.Calibration("model", "test", 1, workers)
    calib.set_layer(0, SHAPE)
    n = 512
    k, v = rows(n)
    positions = np.arange(n, dtype=np.int32)
    calib.observe(0, np.random.default_rng(2).standard_normal((n, 4, 32), np.float32), k, v, positions, 0.2)
    calib.prepare()
    for side, original in zip(Side, (k, v)):
        coarse = original.copy()
        distortion = calib.perturb(0, side, 2.0, positions, coarse)
        assert distortion > 0 and (coarse != original).any() and (coarse[:4] == original[:4]).all()
        calib.set_sensitivity(0, side, 0.01, distortion)
    plan = calib.solve("wide", 6.5, 8192)
    assert (plan.model, plan.arch, plan.profile, plan.context) == ("model", "test", "wide", 8192)
    assert plan.bits_total <= 6.5


def test_failures_are_sentences(tmp_path):
    (tmp_path / "bad.tqkv").write_bytes(b"not a plan")
    with pytest.raises(turboquant.TurboQuantError, match=r"bad\.tqkv: .*magic.*not a \.tqkv plan") as caught:
        turboquant.Plan.load(tmp_path / "bad.tqkv")
    assert caught.value.status == 4
    with pytest.raises(turboquant.TurboQuantError, match="store of 1 x 0 tokens"):
        turboquant.Store(turboquant.Plan.builtin(turboquant.Builtin.F16, SHAPE), 0, 0)
