/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations on a store, beside a model that is written to be obvious: each token is an
 * object with its own codes, tiers are lists, new tokens are pushed one at a time. After every
 * operation tier, base and codes of every cell must be the same.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "codec/layer_codec.h"
#include "format/record.h"
#include "test_store_make.h"

#define HEADS 2
#define K_DIM 32
#define V_DIM 16
#define CELLS 230
#define STREAMS 2
#define BLOCKS ((CELLS + 15) / 16)
#define TIERS_MAX 4
#define SINKS 6
#define SINK_SLOTS 64
#define FRAME 64
#define ROW_MAX 64 /* bytes of codes: 32 channels of f16 */

static const uint32_t tier_tokens[] = {20, 33, 50};

typedef struct token {
    uint32_t index; /* cell in its stream */
    uint32_t tier;
    bool is_sink, is_new;
    int32_t base;
    uint8_t scale[2][HEADS];
    uint8_t codes[2][HEADS][ROW_MAX];
    float rows[2][HEADS * K_DIM]; /* of a new token */
} token;

typedef struct model_stream {
    token *cells[CELLS];
    token *lists[TIERS_MAX][CELLS + 64]; /* young tiers, oldest first; the last: sinks */
    size_t n[TIERS_MAX];
    int32_t block_base[BLOCKS];
} model_stream;

typedef struct model {
    tqkv_plan *plan;
    tqkv_codec *codec;
    uint32_t n_young;
    model_stream streams[STREAMS];
    test_random random;
    tqkv_store *store;
    tqkv_batch *batch;
} model;

static const uint32_t dims[2] = {K_DIM, V_DIM};
static float scratch[TQKVI_CODEC_SCRATCH_MAX] __attribute__((aligned(64)));

static const float *turn_of(const model *m, int side, int32_t base, float *out)
{
    if (side == 1 || base == 0 || m->codec->heads[0][0].plain)
        return NULL;
    tqkvi_turn_init(&m->codec->rope, base, out, out + K_DIM);
    return out;
}

static void encode_side(const model *m, token *t, int side, const float *rows)
{
    float table[2 * K_DIM];
    const float *turn = turn_of(m, side, t->base, table);

    for (uint32_t g = 0; g < HEADS; g++)
        (void)tqkvi_encode_row(m->codec, (tqkv_side)side, g, t->tier, turn,
                               turn ? turn + K_DIM : NULL, rows + g * dims[side],
                               &t->scale[side][g], t->codes[side][g], scratch);
}

static void decode_side(const model *m, const token *t, int side, float *rows)
{
    float table[2 * K_DIM];
    const float *turn = turn_of(m, side, t->base, table);

    for (uint32_t g = 0; g < HEADS; g++)
        tqkvi_decode_row(m->codec, (tqkv_side)side, g, t->tier, turn, turn ? turn + K_DIM : NULL,
                         t->scale[side][g], t->codes[side][g], rows + g * dims[side], scratch);
}

/* A token that has codes gets those of another tier and base. */
static void recode(const model *m, token *t, uint32_t tier, int32_t base)
{
    const token was = *t;

    t->tier = tier;
    t->base = base;
    if (was.tier == tier && was.base == base)
        return;
    for (uint32_t g = 0; g < HEADS; g++)
        tqkvi_recode_row(m->codec, TQKV_SIDE_V, g, was.tier, was.scale[1][g], was.codes[1][g], tier,
                         &t->scale[1][g], t->codes[1][g], scratch);
    if (was.base != base && !m->codec->heads[0][0].plain) {
        float rows[HEADS * K_DIM];
        decode_side(m, &was, 0, rows);
        encode_side(m, t, 0, rows);
        return;
    }
    for (uint32_t g = 0; g < HEADS; g++)
        tqkvi_recode_row(m->codec, TQKV_SIDE_K, g, was.tier, was.scale[0][g], was.codes[0][g], tier,
                         &t->scale[0][g], t->codes[0][g], scratch);
}

static bool has_bases(const model *m)
{
    return !m->codec->heads[0][0].plain;
}

static int32_t base_of(const model *m, int32_t position)
{
    if (!has_bases(m))
        return 0;
    int32_t base = 0;
    while (base + FRAME <= position)
        base += FRAME;
    while (base > position)
        base -= FRAME;
    return base < -1000000 ? -1000000 : base;
}

static void list_remove(model_stream *s, uint32_t list, const token *t)
{
    for (size_t i = 0; i < s->n[list]; i++) {
        if (s->lists[list][i] == t) {
            memmove(&s->lists[list][i], &s->lists[list][i + 1],
                    (s->n[list] - i - 1) * sizeof(token *));
            s->n[list]--;
            return;
        }
    }
}

static void forget(const model *m, model_stream *s, token *t)
{
    for (uint32_t i = 0; i <= m->n_young; i++)
        list_remove(s, i, t);
    if (s->cells[t->index] == t)
        s->cells[t->index] = NULL;
    free(t);
}

static bool is_old(const model *m, const token *t)
{
    return t && t->tier == m->n_young && !t->is_sink;
}

/* Base that an old token must have; the first of a block decides. */
static int32_t settle_old(const model *m, model_stream *s, const token *t)
{
    const uint32_t block = t->index / 16;

    for (uint32_t i = block * 16; i < block * 16 + 16 && i < CELLS; i++)
        if (s->cells[i] != t && is_old(m, s->cells[i]))
            return s->block_base[block];
    return s->block_base[block] = t->base;
}

/* The tiers and bases where tokens go, in the order of arrival; codes follow in settle(). */
typedef struct arrival {
    token *t;
    uint32_t tier;
    int32_t base;
} arrival;

static void settle(const model *m, arrival *a)
{
    if (a->t->is_new) {
        a->t->tier = a->tier;
        a->t->base = a->base;
        encode_side(m, a->t, 0, a->t->rows[0]);
        encode_side(m, a->t, 1, a->t->rows[1]);
        a->t->is_new = false;
    } else {
        recode(m, a->t, a->tier, a->base);
    }
}

/* Pushes tokens one at a time, then gives each token that moved the codes of where it ended. */
static void push_all(model *m, model_stream *s, token **tokens, size_t n)
{
    static arrival arrivals[4 * CELLS];
    token *old[CELLS + 64];
    size_t n_arrivals = 0, n_old = 0;

    for (size_t i = 0; i < n; i++) {
        if (m->n_young == 0) {
            old[n_old++] = tokens[i];
            continue;
        }
        s->lists[0][s->n[0]++] = tokens[i];
        for (uint32_t tier = 0; tier < m->n_young && s->n[tier] >= tier_tokens[tier] + 16; tier++) {
            for (size_t j = 0; j < 16; j++) {
                token *t = s->lists[tier][0];
                list_remove(s, tier, t);
                if (tier + 1 < m->n_young)
                    s->lists[tier + 1][s->n[tier + 1]++] = t;
                else
                    old[n_old++] = t;
            }
        }
    }
    for (uint32_t tier = 0; tier < m->n_young; tier++)
        for (size_t i = 0; i < s->n[tier]; i++)
            if (s->lists[tier][i]->tier != tier || s->lists[tier][i]->is_new)
                arrivals[n_arrivals++] =
                    (arrival){s->lists[tier][i], tier, s->lists[tier][i]->base};
    for (size_t i = 0; i < n_old; i++) {
        token was = *old[i];
        old[i]->tier = m->n_young; /* so that later ones of its block see it */
        const int32_t base = settle_old(m, s, old[i]);
        old[i]->tier = was.tier;
        /* Codes are changed at once: the tier says from now on that the token is old. */
        arrival a = {old[i], m->n_young, base};
        settle(m, &a);
    }
    for (size_t i = 0; i < n_arrivals; i++)
        settle(m, &arrivals[i]);
}

static token *new_token(model *m, model_stream *s, uint32_t index, int32_t position)
{
    token *t = calloc(1, sizeof(*t));

    assert_non_null(t);
    (void)s;
    t->index = index;
    t->is_new = true;
    t->base = base_of(m, position);
    t->tier = UINT32_MAX;
    return t;
}

static bool take_sink(model *m, model_stream *s, token *t, int32_t position)
{
    if (m->n_young == 0 || position < 0 || position >= SINKS || s->n[m->n_young] >= SINK_SLOTS)
        return false;
    s->lists[m->n_young][s->n[m->n_young]++] = t;
    t->is_sink = true;
    arrival a = {t, 0, t->base};
    settle(m, &a);
    return true;
}

/* n distinct cells of one stream or of all. */
static size_t pick_cells(model *m, int64_t *cells)
{
    const uint32_t kind = test_random_below(&m->random, 4);
    const uint32_t first = test_random_below(&m->random, CELLS * STREAMS);
    const uint32_t most = kind == 0 ? 1 : kind == 1 ? 20 : kind == 2 ? 60 : CELLS;
    const uint32_t n = 1 + test_random_below(&m->random, most);
    const uint32_t step = kind == 2 ? 7 : 1; /* 7 and 460 have no common factor */

    for (uint32_t i = 0; i < n; i++)
        cells[i] = (first + i * step) % (CELLS * STREAMS);
    return n;
}

static void model_batch(model *m, const int64_t *cells, const int32_t *positions, size_t n,
                        float *const rows[2], const bool has[2])
{
    for (uint32_t stream = 0; stream < STREAMS; stream++) {
        model_stream *s = &m->streams[stream];
        token *made[CELLS], *ordinary[CELLS];
        int32_t at[CELLS];
        size_t n_made = 0, n_ordinary = 0;
        for (size_t i = 0; i < n; i++) {
            if (cells[i] / CELLS != stream)
                continue;
            const uint32_t index = (uint32_t)(cells[i] % CELLS);
            at[n_made] = positions ? positions[i] : (int32_t)index;
            token *t = new_token(m, s, index, at[n_made]);
            for (int side = 0; side < 2; side++) {
                if (has[side])
                    memcpy(t->rows[side], rows[side] + i * HEADS * dims[side],
                           HEADS * dims[side] * sizeof(float));
                else if (s->cells[index])
                    decode_side(m, s->cells[index], side, t->rows[side]);
            }
            made[n_made++] = t;
        }
        for (size_t i = 0; i < n_made; i++)
            if (s->cells[made[i]->index])
                forget(m, s, s->cells[made[i]->index]);
        for (size_t i = 0; i < n_made; i++) {
            s->cells[made[i]->index] = made[i];
            if (!take_sink(m, s, made[i], at[i]))
                ordinary[n_ordinary++] = made[i];
        }
        push_all(m, s, ordinary, n_ordinary);
    }
}

static void do_batch(model *m)
{
    int64_t cells[CELLS];
    int32_t positions[CELLS];
    const size_t n = pick_cells(m, cells);
    const bool with_positions = test_random_below(&m->random, 3) != 0;
    const int32_t start = (int32_t)test_random_below(&m->random, 3000) - 300;
    float *rows[2];
    bool has[2] = {test_random_below(&m->random, 12) != 0, test_random_below(&m->random, 12) != 0};
    const tqkv_parallel parallel = test_threads(3);

    for (size_t i = 0; i < n; i++)
        positions[i] = start + (int32_t)i;
    assert_int_equal(
        tqkv_batch_begin(m->batch, m->store, cells, with_positions ? positions : NULL, n), TQKV_OK);
    for (int side = 0; side < 2; side++) {
        rows[side] = calloc(n * HEADS * dims[side], sizeof(float));
        assert_non_null(rows[side]);
        test_fill_normal(&m->random, 1, rows[side], n * HEADS * dims[side]);
        if (has[side])
            assert_int_equal(
                tqkv_batch_put(m->batch, (tqkv_side)side, rows[side], HEADS * dims[side]), TQKV_OK);
    }
    assert_int_equal(
        tqkv_batch_commit(m->batch, test_random_below(&m->random, 2) ? &parallel : NULL), TQKV_OK);
    if (has[0] || has[1])
        model_batch(m, cells, with_positions ? positions : NULL, n, rows, has);
    free(rows[0]);
    free(rows[1]);
}

static void do_write(model *m)
{
    const uint32_t cell = test_random_below(&m->random, CELLS * STREAMS), index = cell % CELLS;
    const int32_t position = (int32_t)test_random_below(&m->random, 500);
    model_stream *s = &m->streams[cell / CELLS];

    for (int side = 0; side < 2; side++) {
        float row[HEADS * K_DIM];
        test_fill_normal(&m->random, 1, row, HEADS * dims[side]);
        assert_int_equal(tqkv_store_write(m->store, cell, (tqkv_side)side, &position, row),
                         TQKV_OK);
        if (side == 1) {
            encode_side(m, s->cells[index], 1, row);
            continue;
        }
        token *t = new_token(m, s, index, position), *before = s->cells[index];
        memcpy(t->rows[0], row, sizeof(t->rows[0]));
        if (before && m->n_young == 0)
            s->cells[index] = NULL; /* it does not decide for its block any more */
        if (!take_sink(m, s, t, position))
            push_all(m, s, &t, 1);
        if (before) {
            token copy = *before; /* its V comes along */
            recode(m, &copy, t->tier, copy.base);
            memcpy(t->scale[1], copy.scale[1], sizeof(t->scale[1]));
            memcpy(t->codes[1], copy.codes[1], sizeof(t->codes[1]));
            s->cells[index] = before;
            forget(m, s, before);
        }
        s->cells[index] = t;
    }
}

static void do_shift(model *m)
{
    int32_t deltas[CELLS * STREAMS];
    const uint32_t first = test_random_below(&m->random, CELLS * STREAMS);
    const uint32_t n = test_random_below(&m->random, CELLS * STREAMS - first + 1);
    const uint32_t kind = test_random_below(&m->random, 3);
    const int32_t delta = (int32_t)test_random_below(&m->random, 200) - 100;

    for (uint32_t i = 0; i < n; i++)
        deltas[i] = kind == 2                 ? (int32_t)test_random_below(&m->random, 3) - 1
                    : kind == 1 && i % 5 == 0 ? 0
                                              : delta;
    assert_int_equal(tqkv_store_shift(m->store, first, deltas, n), TQKV_OK);
    for (uint32_t block = 0; block < BLOCKS * STREAMS; block++) {
        model_stream *s = &m->streams[block / BLOCKS];
        const uint32_t begin = block % BLOCKS * 16;
        bool alike = has_bases(m), any = false;
        int32_t common = 0;
        for (uint32_t i = begin; i < begin + 16 && i < CELLS; i++) {
            const uint32_t cell = block / BLOCKS * CELLS + i;
            const int32_t own = cell >= first && cell < first + n ? deltas[cell - first] : 0;
            token *t = s->cells[i];
            if (t && !is_old(m, t) && has_bases(m))
                t->base += own;
            if (is_old(m, t)) {
                alike = alike && (!any || own == common);
                common = own;
                any = true;
            }
        }
        if (any && alike)
            s->block_base[block % BLOCKS] += common;
        for (uint32_t i = begin; i < begin + 16 && i < CELLS; i++) {
            const uint32_t cell = block / BLOCKS * CELLS + i;
            const int32_t own = cell >= first && cell < first + n ? deltas[cell - first] : 0;
            token *t = s->cells[i];
            if (!t || own == 0 || (!is_old(m, t) && has_bases(m)))
                continue;
            if (alike) {
                t->base += own;
                continue;
            }
            float rows[HEADS * K_DIM], table[2 * K_DIM];
            decode_side(m, t, 0, rows);
            tqkvi_turn_init(&m->codec->rope, own, table, table + K_DIM);
            for (uint32_t g = 0; g < HEADS; g++)
                tqkvi_turn_apply(&m->codec->rope, table, table + K_DIM, false, rows + g * K_DIM);
            encode_side(m, t, 0, rows);
        }
    }
}

static tqkv_store *make_store(const model *m)
{
    tqkv_store_config config;
    tqkv_store *store;

    tqkv_store_config_init(&config);
    config.plan = m->plan;
    config.n_cells = CELLS;
    config.n_streams = STREAMS;
    assert_int_equal(tqkv_store_create(&config, &store), TQKV_OK);
    return store;
}

/* Saves every cell into another store, K first, and goes on with that one. */
static void do_restore(model *m)
{
    tqkv_store *other = make_store(m);

    for (int side = 0; side < 2; side++) {
        const size_t most = tqkv_store_record_bytes(m->store, (tqkv_side)side);
        uint8_t *record = malloc(most);
        assert_non_null(record);
        for (int64_t cell = 0; cell < CELLS * STREAMS; cell++) {
            size_t n_bytes;
            if (!m->streams[cell / CELLS].cells[cell % CELLS])
                continue;
            assert_int_equal(tqkv_store_export(m->store, cell, (tqkv_side)side, record, &n_bytes),
                             TQKV_OK);
            assert_true(n_bytes <= most);
            assert_int_equal(tqkv_store_import(other, cell, (tqkv_side)side, record, n_bytes),
                             TQKV_OK);
        }
        free(record);
    }
    tqkv_store_destroy(m->store);
    m->store = other;
    for (uint32_t stream = 0; stream < STREAMS; stream++) {
        model_stream *s = &m->streams[stream];
        memset(s->n, 0, sizeof(s->n));
        for (uint32_t i = 0; i < CELLS; i++) {
            token *t = s->cells[i];
            if (!t || is_old(m, t))
                continue;
            const uint32_t list = t->is_sink ? m->n_young : t->tier;
            s->lists[list][s->n[list]++] = t;
        }
    }
}

static void drop_stream(const model *m, model_stream *s)
{
    for (uint32_t i = 0; i < CELLS; i++)
        if (s->cells[i])
            forget(m, s, s->cells[i]);
}

static void do_copy(model *m)
{
    const uint32_t from = test_random_below(&m->random, STREAMS),
                   to = test_random_below(&m->random, STREAMS);
    model_stream *a = &m->streams[from], *b = &m->streams[to];

    assert_int_equal(tqkv_store_copy_stream(m->store, to, m->store, from), TQKV_OK);
    if (a == b)
        return;
    drop_stream(m, b);
    *b = *a;
    for (uint32_t i = 0; i < CELLS; i++) {
        if (!a->cells[i])
            continue;
        b->cells[i] = malloc(sizeof(token));
        assert_non_null(b->cells[i]);
        *b->cells[i] = *a->cells[i];
    }
    for (uint32_t list = 0; list <= m->n_young; list++)
        for (size_t i = 0; i < b->n[list]; i++)
            b->lists[list][i] = b->cells[a->lists[list][i]->index];
}

static void check_cell(const model *m, int64_t cell)
{
    const token *t = m->streams[cell / CELLS].cells[cell % CELLS];

    for (int side = 0; side < 2; side++) {
        uint8_t bytes[1024];
        float got[HEADS * K_DIM], want[HEADS * K_DIM] = {0};
        size_t n_bytes;
        tqkvi_record record;
        assert_int_equal(tqkv_store_read(m->store, cell, (tqkv_side)side, got), TQKV_OK);
        if (t)
            decode_side(m, t, side, want);
        assert_memory_equal(got, want, HEADS * dims[side] * sizeof(float));
        assert_true(tqkv_store_record_bytes(m->store, (tqkv_side)side) <= sizeof(bytes));
        assert_int_equal(tqkv_store_export(m->store, cell, (tqkv_side)side, bytes, &n_bytes),
                         TQKV_OK);
        assert_int_equal(tqkvi_record_unpack(m->plan, 0, (tqkv_side)side, bytes, n_bytes, &record),
                         TQKV_OK);
        if (!t)
            continue;
        assert_int_equal(record.tier, t->tier);
        assert_int_equal(record.sink, t->is_sink);
        assert_int_equal(record.base, side == 0 ? t->base : 0);
        for (uint32_t g = 0; g < HEADS; g++) {
            const uint8_t *at = bytes + tqkvi_record_head(m->plan, &record, g);
            assert_int_equal(at[0], t->scale[side][g]);
            assert_memory_equal(
                at + 1, t->codes[side][g],
                tqkvi_codec_layout(m->codec, (tqkv_side)side, g, t->tier)->row_bytes);
        }
    }
}

static void check_all(const model *m)
{
    uint64_t n_tokens[TQKV_TIERS_MAX] = {0};
    tqkv_store_stats stats;

    for (int64_t cell = 0; cell < CELLS * STREAMS; cell++) {
        const token *t = m->streams[cell / CELLS].cells[cell % CELLS];
        check_cell(m, cell);
        if (t)
            n_tokens[t->tier]++;
    }
    tqkv_store_get_stats(m->store, &stats);
    assert_memory_equal(stats.n_tokens, n_tokens, sizeof(n_tokens));
}

static void run(tqkv_plan *plan, uint64_t seed, uint32_t n_steps)
{
    model *m = calloc(1, sizeof(*m));

    assert_non_null(m);
    m->plan = plan;
    m->random.state = seed;
    m->n_young = plan->n_tiers - 1;
    assert_int_equal(tqkvi_codec_create(plan, 0, NULL, NULL, &m->codec), TQKV_OK);
    assert_int_equal(tqkv_batch_create(NULL, &m->batch), TQKV_OK);
    m->store = make_store(m);
    for (uint32_t step = 0; step < n_steps; step++) {
        const uint32_t what = test_random_below(&m->random, 20);
        if (what < 12)
            do_batch(m);
        else if (what < 14)
            do_write(m);
        else if (what < 16)
            do_shift(m);
        else if (what < 18)
            do_restore(m);
        else if (what < 19)
            do_copy(m);
        else if (test_random_below(&m->random, 3) == 0) {
            tqkv_store_clear(m->store);
            for (uint32_t i = 0; i < STREAMS; i++)
                drop_stream(m, &m->streams[i]);
        }
        check_all(m);
    }
    for (uint32_t i = 0; i < STREAMS; i++)
        drop_stream(m, &m->streams[i]);
    tqkv_batch_destroy(m->batch);
    tqkv_store_destroy(m->store);
    tqkvi_codec_destroy(m->codec);
    tqkv_plan_destroy(plan);
    free(m);
}

static void run_tiers(uint32_t n_tiers)
{
    const tqkv_plan_layer shape = test_shape(4, HEADS, K_DIM, V_DIM);

    for (uint64_t seed = 1; seed <= 3; seed++) {
        tqkv_plan *plan;
        print_message("seed %d\n", (int)seed);
        assert_int_equal(test_tiered_plan(seed, &shape, n_tiers, tier_tokens, SINKS, FRAME, &plan),
                         TQKV_OK);
        run(plan, seed, 80);
    }
}

static void test_one_tier(void **state)
{
    (void)state;
    run_tiers(1);
}

static void test_two_tiers(void **state)
{
    (void)state;
    run_tiers(2);
}

static void test_four_tiers(void **state)
{
    (void)state;
    run_tiers(4);
}

static void test_f16(void **state)
{
    const tqkv_plan_layer shape = test_shape(4, HEADS, K_DIM, V_DIM);
    tqkv_plan *plan;

    (void)state;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    run(plan, 9, 80);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_tier),
        cmocka_unit_test(test_two_tiers),
        cmocka_unit_test(test_four_tiers),
        cmocka_unit_test(test_f16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
