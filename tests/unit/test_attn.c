/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention of a store against the same sum in double over decoded rows (tqkv_store_read) and the
 * raw rows of the batch. The bound of each output scales with the terms that made it. Where few
 * rows read codes as integers (attn/attn_codes.h), it grows by what rounding may do.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn_tile.h"
#include "base/half.h"
#include "cache/cell_store.h"
#include "format/block_rows.h"
#include "test_arrays.h"
#include "test_rounding.h"
#include "test_store_make.h"

#define GUARD 12345.0f
/*
 * Rounding errors are counted in eps of the terms before the transform; the transforms of the tests
 * have condition numbers below about 30, and the sums of a row are dim long.
 */
#define CONDITION 30.0

typedef struct attn_case {
    const char *name;
    uint32_t n_heads, n_kv_heads, k_dim, v_dim;
    uint32_t n_tiers; /* 0: built-in f16, 1 with q8 */
    tqkv_builtin builtin;
    uint32_t n_cells, n_streams;
    uint32_t n_written; /* tokens committed per stream */
    uint32_t n_batch;   /* tokens staged in stream 0 */
    uint32_t n_q;
    bool mask, causal, slopes, sinks;
    float softcap;
    bool is_latent;
} attn_case;

typedef struct attn_setup {
    const attn_case *c;
    tqkv_plan *plan;
    tqkv_store *store;
    tqkv_batch *batch;
    int64_t *cells; /* of the batch */
    float *rows[2]; /* of the batch */
    float *q, *out, *lse, *slopes, *sinks;
    uint16_t *mask;
    void *scratch;
    test_random random;
} attn_setup;

static const uint32_t tier_tokens[] = {20, 33, 50};

static void *get(size_t bytes)
{
    void *p = calloc(1, bytes + TQKV_ALIGN);
    assert_non_null(p);
    return p;
}

static void make_plan(attn_setup *s)
{
    const attn_case *c = s->c;
    tqkv_plan_layer shape = test_shape(c->n_heads, c->n_kv_heads, c->k_dim, c->v_dim);

    shape.is_latent = c->is_latent;
    if (c->n_tiers == 0)
        assert_int_equal(tqkv_plan_builtin(c->builtin, &shape, &s->plan), TQKV_OK);
    else
        assert_int_equal(test_tiered_plan(7, &shape, c->n_tiers, tier_tokens, 4, 64, &s->plan),
                         TQKV_OK);
}

/* Tokens 0, 1, ... of one stream in batches of odd sizes; some rows are NaN, some zero. */
static void write_tokens(attn_setup *s, uint32_t stream)
{
    const attn_case *c = s->c;
    const size_t k_floats = (size_t)c->n_kv_heads * c->k_dim,
                 v_floats = (size_t)c->n_kv_heads * c->v_dim;

    for (uint32_t done = 0; done < c->n_written;) {
        const uint32_t want = 1 + test_random_below(&s->random, 70);
        const uint32_t n = want < c->n_written - done ? want : c->n_written - done;
        int64_t *cells = get(n * sizeof(*cells));
        float *k = get(n * k_floats * sizeof(*k)), *v = get(n * v_floats * sizeof(*v));
        for (uint32_t i = 0; i < n; i++)
            cells[i] = (int64_t)stream * c->n_cells + done + i;
        test_fill_normal(&s->random, 1, k, n * k_floats);
        test_fill_normal(&s->random, 1, v, n * v_floats);
        if (done % 3 == 0)
            k[0] = v[v_floats - 1] = NAN;
        assert_int_equal(tqkv_batch_begin(s->batch, s->store, cells, NULL, n), TQKV_OK);
        assert_int_equal(tqkv_batch_put(s->batch, TQKV_SIDE_K, k, k_floats), TQKV_OK);
        assert_int_equal(tqkv_batch_put(s->batch, TQKV_SIDE_V, v, v_floats), TQKV_OK);
        assert_int_equal(tqkv_batch_commit(s->batch, NULL), TQKV_OK);
        free(cells);
        free(k);
        free(v);
        done += n;
    }
}

/* Half of the batch overwrites cells, the rest follows the last one. */
static void stage_batch(attn_setup *s)
{
    const attn_case *c = s->c;
    const size_t n = c->n_batch, k_floats = (size_t)c->n_kv_heads * c->k_dim;
    const size_t v_floats = (size_t)c->n_kv_heads * c->v_dim;

    s->cells = get((n + 1) * sizeof(*s->cells));
    s->rows[0] = get((n + 1) * k_floats * sizeof(float));
    s->rows[1] = get((n + 1) * v_floats * sizeof(float));
    for (uint32_t i = 0; i < n; i++)
        s->cells[i] = i < n / 2 && 3 * i + 1 < c->n_written ? 3 * i + 1 : c->n_written + i;
    test_fill_normal(&s->random, 1, s->rows[0], n * k_floats);
    test_fill_normal(&s->random, 1, s->rows[1], n * v_floats);
    assert_int_equal(tqkv_batch_begin(s->batch, s->store, s->cells, NULL, n), TQKV_OK);
    assert_int_equal(tqkv_batch_put(s->batch, TQKV_SIDE_K, s->rows[0], k_floats), TQKV_OK);
    assert_int_equal(tqkv_batch_put(s->batch, TQKV_SIDE_V, s->rows[1], v_floats), TQKV_OK);
}

/* Floats of one query of one head. In a latent layer the part for V comes first. */
static size_t query_floats(const attn_case *c)
{
    return c->k_dim + (c->is_latent ? c->v_dim : 0);
}

static void make_queries(attn_setup *s)
{
    const attn_case *c = s->c;
    static const float values[] = {0, 0, 0, -1.5f, 2, -INFINITY, -INFINITY};

    s->q = get((size_t)c->n_q * c->n_heads * query_floats(c) * sizeof(float));
    s->out = get((size_t)c->n_q * c->n_heads * (c->v_dim + 3) * sizeof(float));
    s->lse = get((size_t)c->n_q * c->n_heads * sizeof(float));
    s->slopes = get(c->n_heads * sizeof(float));
    s->sinks = get(c->n_heads * sizeof(float));
    s->mask = get((size_t)c->n_q * c->n_cells * sizeof(uint16_t));
    test_fill_normal(&s->random, 1, s->q, (size_t)c->n_q * c->n_heads * query_floats(c));
    test_fill_normal(&s->random, 1, s->sinks, c->n_heads);
    for (uint32_t h = 0; h < c->n_heads; h++)
        s->slopes[h] = h == 0 ? 0.0f : 1.0f / (float)h;
    for (uint32_t q = 0; q < c->n_q; q++) {
        /* Every fifth query sees nothing; others differ in how long their hidden stretches are. */
        const uint32_t stretch = 1 + test_random_below(&s->random, 90);
        uint16_t value = 0;
        for (uint32_t cell = 0; cell < c->n_cells; cell++) {
            if (cell % stretch == 0)
                value = tqkvi_float_to_half(values[test_random_below(&s->random, 7)]);
            s->mask[(size_t)q * c->n_cells + cell] = q % 5 == 4 ? 0xfc00 : value;
        }
    }
}

static void setup(attn_setup *s, const attn_case *c, uint64_t seed)
{
    *s = (attn_setup){.c = c, .random = {.state = seed}};
    make_plan(s);
    tqkv_store_config config;
    tqkv_store_config_init(&config);
    config.plan = s->plan;
    config.n_cells = c->n_cells;
    config.n_streams = c->n_streams;
    assert_int_equal(tqkv_store_create(&config, &s->store), TQKV_OK);
    assert_int_equal(tqkv_batch_create(NULL, &s->batch), TQKV_OK);
    for (uint32_t i = 0; i < c->n_streams; i++)
        write_tokens(s, i);
    stage_batch(s);
    make_queries(s);
}

static void teardown(attn_setup *s)
{
    tqkv_batch_destroy(s->batch);
    tqkv_store_destroy(s->store);
    tqkv_plan_destroy(s->plan);
    void *all[] = {s->cells, s->rows[0], s->rows[1], s->q,   s->out,
                   s->lse,   s->slopes,  s->sinks,   s->mask};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

static tqkv_attend_args make_args(attn_setup *s)
{
    const attn_case *c = s->c;
    tqkv_attend_args args;

    tqkv_attend_args_init(&args);
    args.n_q = c->n_q;
    args.n_cells = c->n_cells - 1;
    args.q = c->is_latent ? s->q + c->v_dim : s->q;
    args.q_latent = c->is_latent ? s->q : NULL;
    args.q_head_stride = query_floats(c);
    args.q_token_stride = c->n_heads * query_floats(c);
    args.out = s->out;
    args.out_head_stride = (size_t)c->n_q * (c->v_dim + 3); /* heads outermost, and a gap */
    args.out_token_stride = c->v_dim + 3;
    args.lse = s->lse;
    args.mask = c->mask ? s->mask : NULL;
    args.mask_row_stride = c->n_cells;
    args.slopes = c->slopes ? s->slopes : NULL;
    args.sinks = c->sinks ? s->sinks : NULL;
    args.scale = 1.0f / sqrtf((float)query_floats(c));
    args.softcap = c->softcap;
    args.causal = c->causal;
    return args;
}

/* One head of a cell that has codes. */
typedef struct oracle_code {
    bool coded;
    uint32_t tier;
    int32_t base;
    uint8_t scale[2]; /* by side; 0: the zero vector */
    uint8_t row[TQKVI_ROW_BYTES_MAX]; /* of K */
} oracle_code;

/* Rows as attention should see them. kind: 0 nothing is there, 1 committed, 2 + i staged as i. */
typedef struct oracle_rows {
    int *kind;
    float *rows[2];     /* [n_cells][n_kv_heads][dim] */
    oracle_code *codes; /* [n_cells][n_kv_heads] */
} oracle_rows;

static oracle_code read_code(const attn_setup *s, uint32_t cell, uint32_t g)
{
    const tqkv_codec *codec = s->store->codec;
    oracle_code code = {.coded = false};
    tqkvi_spot spot;
    uint32_t pool;

    if (!codec->heads[0][g].plain && tqkvi_store_find(s->store, cell, &spot, &pool)) {
        code = (oracle_code){.coded = true, .tier = spot.tier, .base = spot.base};
        for (int side = 0; side < 2; side++)
            code.scale[side] = *tqkvi_spot_scale(s->store, &spot, (tqkv_side)side, g);
        tqkvi_spot_get_row(s->store, &spot, TQKV_SIDE_K, g, code.row);
    }
    return code;
}

/* Whether the task of a query row reads codes. */
static bool has_few_rows(const attn_setup *s, uint32_t q, uint32_t h)
{
    const attn_case *c = s->c;
    const uint32_t group = c->n_heads / c->n_kv_heads, n = c->n_q * group;
    const uint32_t block = tqkvi_attn_rows(&s->store->codec->layer->shape);
    const uint32_t first = (q * group + h % group) / block * block;

    return !c->is_latent && (n - first < block ? n - first : block) <= TQKVI_CODE_ROWS_MAX;
}

/* What rounding q' may do to the score of each cell of a query: [n_cells] out. */
static void score_slack(const attn_setup *s, const tqkv_attend_args *args, const oracle_rows *r,
                        uint32_t q, uint32_t h, double *slack)
{
    const tqkv_codec *codec = s->store->codec;
    const uint32_t g = h / (s->c->n_heads / s->c->n_kv_heads);
    const float *query = args->q + q * args->q_token_stride + h * args->q_head_stride;
    const oracle_code *last = NULL;
    double top[TQKV_UNITS_MAX], moved[TQKV_UNITS_MAX];

    for (uint32_t cell = 0; cell < s->c->n_cells; cell++) {
        const oracle_code *code = &r->codes[(size_t)cell * s->c->n_kv_heads + g];
        slack[cell] = 0;
        if (r->kind[cell] != 1 || !code->coded || !has_few_rows(s, q, h))
            continue;
        if (!last || last->base != code->base)
            test_largest_query(codec, g, s->store->has_bases, code->base, query, top, moved);
        last = code;
        slack[cell] = (double)args->scale * test_rounding_slack(codec, g, code->tier,
                                                                code->scale[0], code->row, top,
                                                                moved);
    }
}

/* A cell's V has more than 4 bits in the mean, or lies in a slot of a young tier. */
static bool has_fine_weights(const attn_setup *s, const oracle_code *code, uint32_t g)
{
    const tqkvi_layout *layout =
        &s->store->codec->layer->heads[TQKV_SIDE_V][g].layout[code->tier];
    return code->tier + 1 < s->store->plan->n_tiers || layout->row_bytes > 8 * layout->n_units;
}

/* Six standard deviations of what rounding weights does to channel d of an output; p: [n_cells]. */
static double weight_slack(const attn_setup *s, const oracle_rows *r, uint32_t q, uint32_t h,
                           uint32_t d, const double *p)
{
    const attn_case *c = s->c;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads);
    const float mean =
        s->store->codec->heads[1][g].plan->mean ? s->store->codec->heads[1][g].plan->mean[d] : 0;
    double top[2] = {0}, squares[2] = {0}; /* of coarse and of fine weights */

    for (uint32_t cell = 0; cell < c->n_cells - 1 && has_few_rows(s, q, h); cell++) {
        const oracle_code *code = &r->codes[(size_t)cell * c->n_kv_heads + g];
        if (r->kind[cell] != 1 || !code->coded || code->scale[1] == 0)
            continue;
        const bool fine = has_fine_weights(s, code, g);
        const double v = (double)r->rows[1][((size_t)cell * c->n_kv_heads + g) * c->v_dim + d];
        const double scale = (double)tqkvk_scale_value(code->scale[1]);
        top[fine] = fmax(top[fine], p[cell] * scale);
        squares[fine] += pow((v - (double)mean) / scale, 2);
    }
    return 6 * top[0] / TQKVK_COARSE_WEIGHT_MAX * sqrt(squares[0] / 12) +
           6 * top[1] / TQKVK_WEIGHT_MAX * sqrt(squares[1] / 12);
}

/* The most that f16 in place of the inverse of V does to each channel: [v_dim] out; p: [n_cells]. */
static void half_slack(const attn_setup *s, const oracle_rows *r, uint32_t h, const double *p,
                       double *slack)
{
    const attn_case *c = s->c;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads), dim = c->v_dim;
    const tqkvi_head_codec *head = &s->store->codec->heads[1][g];
    double sum[TQKVI_DIM_MAX] = {0};

    memset(slack, 0, dim * sizeof(*slack));
    for (uint32_t cell = 0; cell < c->n_cells - 1 && !head->plain; cell++) {
        const oracle_code *code = &r->codes[(size_t)cell * c->n_kv_heads + g];
        const float *v = r->rows[1] + ((size_t)cell * c->n_kv_heads + g) * dim;
        if (r->kind[cell] != 1 || !code->coded || code->scale[1] == 0)
            continue;
        for (uint32_t i = 0; i < dim; i++)
            sum[i] += p[cell] * ((double)v[i] - (double)head->plan->mean[i]);
    }
    for (uint32_t j = 0; j < dim && !head->plain; j++) {
        double y = 0;
        for (uint32_t i = 0; i < dim; i++)
            y += (double)head->plan->transform[(size_t)i * dim + j] * sum[i];
        for (uint32_t d = 0; d < dim; d++)
            slack[d] += 0x1p-11 * fabs(y * (double)head->inverse[(size_t)j * dim + d]);
    }
}

static oracle_rows read_rows(const attn_setup *s, uint32_t stream)
{
    const attn_case *c = s->c;
    oracle_rows r = {.kind = get(c->n_cells * sizeof(int)),
                     .codes = get((size_t)c->n_cells * c->n_kv_heads * sizeof(oracle_code))};

    for (int side = 0; side < 2; side++) {
        const size_t floats = (size_t)c->n_kv_heads * (side == 0 ? c->k_dim : c->v_dim);
        r.rows[side] = get(c->n_cells * floats * sizeof(float));
        for (uint32_t cell = 0; cell < c->n_cells; cell++) {
            r.kind[cell] = cell < c->n_written;
            assert_int_equal(tqkv_store_read(s->store, (int64_t)stream * c->n_cells + cell,
                                             (tqkv_side)side, r.rows[side] + cell * floats),
                             TQKV_OK);
        }
        for (uint32_t i = 0; i < c->n_batch && stream == 0; i++)
            memcpy(r.rows[side] + (size_t)s->cells[i] * floats, s->rows[side] + i * floats,
                   floats * sizeof(float));
    }
    for (uint32_t i = 0; i < c->n_batch && stream == 0; i++)
        r.kind[s->cells[i]] = (int)(2 + i);
    for (uint32_t i = 0; i < c->n_cells * c->n_kv_heads; i++)
        r.codes[i] = read_code(s, stream * c->n_cells + i / c->n_kv_heads, i % c->n_kv_heads);
    return r;
}

/*
 * Score of one cell, or -inf; *error grows to the largest bound of a score. slack: what rounding
 * may do to it.
 */
static double oracle_score(const attn_setup *s, const tqkv_attend_args *args, const oracle_rows *r,
                           uint32_t q, uint32_t h, uint32_t cell, double slack, double *error)
{
    const attn_case *c = s->c;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads);
    const float *k = r->rows[0] + ((size_t)cell * c->n_kv_heads + g) * c->k_dim;
    const float *query = args->q + q * args->q_token_stride + h * args->q_head_stride;
    const float mask =
        args->mask ? tqkvi_half_to_float(args->mask[q * args->mask_row_stride + cell]) : 0;
    double score = 0, terms = 0;

    if (mask == -INFINITY || (!args->mask && r->kind[cell] == 0))
        return -INFINITY;
    if (!args->mask && args->causal && r->kind[cell] >= 2 && (uint32_t)r->kind[cell] - 2 > q)
        return -INFINITY;
    for (uint32_t d = 0; d < c->k_dim; d++) {
        score += (double)query[d] * (double)k[d];
        terms += fabs((double)query[d]) * fabs((double)k[d]);
    }
    for (uint32_t d = 0; d < c->v_dim && c->is_latent; d++) {
        const double part = (double)args->q_latent[query - args->q + d] *
                            (double)r->rows[1][(size_t)cell * c->v_dim + d];
        score += part;
        terms += fabs(part);
    }
    score *= (double)args->scale;
    terms *= (double)args->scale;
    if (args->softcap > 0)
        score = (double)args->softcap * tanh(score / (double)args->softcap);
    score += (double)mask * (args->slopes ? (double)args->slopes[h] : 1);
    const double bound =
        slack + (double)FLT_EPSILON * (CONDITION * (terms + 1) * 8 + fabs(score) * 4);
    *error = bound > *error ? bound : *error;
    return score;
}

static void check_row(const attn_setup *s, const tqkv_attend_args *args, const oracle_rows *r,
                      uint32_t q, uint32_t h)
{
    const attn_case *c = s->c;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads);
    double *scores = get(c->n_cells * sizeof(*scores)), error = 0, top = -INFINITY, sum = 0;
    double *p = get(c->n_cells * sizeof(*p)), *slack = get(c->n_cells * sizeof(*slack));

    score_slack(s, args, r, q, h, slack);
    for (uint32_t cell = 0; cell < args->n_cells; cell++) {
        scores[cell] = oracle_score(s, args, r, q, h, cell, slack[cell], &error);
        top = scores[cell] > top ? scores[cell] : top;
    }
    if (args->sinks)
        top = (double)args->sinks[h] > top ? (double)args->sinks[h] : top;
    for (uint32_t cell = 0; cell < args->n_cells; cell++)
        sum += top == -INFINITY ? 0 : exp(scores[cell] - top);
    if (args->sinks)
        sum += exp((double)args->sinks[h] - top);
    for (uint32_t cell = 0; cell < args->n_cells && sum > 0; cell++)
        p[cell] = exp(scores[cell] - top) / sum;

    const float *out = args->out + q * args->out_token_stride + h * args->out_head_stride;
    double halves[TQKVI_DIM_MAX];
    half_slack(s, r, h, p, halves);
    for (uint32_t d = 0; d < c->v_dim; d++) {
        double want = 0, largest = 0;
        for (uint32_t cell = 0; cell < args->n_cells && sum > 0; cell++) {
            const double v = (double)r->rows[1][((size_t)cell * c->n_kv_heads + g) * c->v_dim + d];
            want += p[cell] * v;
            largest = scores[cell] > -INFINITY && fabs(v) > largest ? fabs(v) : largest;
        }
        /* A relative error e of every probability moves the mean by 2 e times the largest value. */
        const double bound = 2 * (error + CONDITION * 8 * (double)FLT_EPSILON) * (largest + 1) +
                             weight_slack(s, r, q, h, d, p) + halves[d];
        if (!(fabs((double)out[d] - want) <= (sum > 0 ? bound : 0)))
            fail_msg("%s: q %u h %u d %u: %.9g, not %.9g (bound %.3g)", c->name, q, h, d,
                     (double)out[d], want, bound);
    }
    const double lse = sum > 0 ? top + log(sum) : -INFINITY;
    const float got = args->lse[(size_t)q * c->n_heads + h];
    if (sum > 0
            ? !(fabs((double)got - lse) <= 2 * error + 8 * (double)FLT_EPSILON * (fabs(lse) + 1))
            : got != -INFINITY)
        fail_msg("%s: q %u h %u lse %.9g, not %.9g", c->name, q, h, (double)got, lse);
    free(scores);
    free(p);
    free(slack);
}

static const attn_case cases[] = {
    {"f16 decode", 4, 2, 32, 32, 0, TQKV_BUILTIN_F16, 100, 1, 90, 1, 1, .mask = true},
    {"f16 causal", 4, 4, 16, 48, 0, TQKV_BUILTIN_F16, 150, 1, 77, 40, 40, .causal = true},
    {"q8 decode", 6, 2, 64, 32, 0, TQKV_BUILTIN_Q8, 100, 2, 90, 1, 1, .mask = true, .sinks = true},
    {"q8 see all", 3, 1, 32, 32, 0, TQKV_BUILTIN_Q8, 333, 1, 300, 9, 3, .mask = false},
    {"one tier", 4, 2, 32, 16, 1, 0, 200, 1, 180, 5, 5, .mask = true},
    {"two tiers", 4, 1, 32, 32, 2, 0, 200, 2, 180, 5, 20, .mask = true, .slopes = true},
    {"four tiers decode", 8, 2, 64, 64, 4, 0, 700, 1, 650, 1, 1, .causal = true},
    {"four tiers short", 8, 2, 64, 64, 4, 0, 700, 1, 17, 0, 1, .causal = true, .sinks = true},
    {"four tiers empty", 2, 2, 16, 16, 4, 0, 70, 1, 0, 0, 3, .causal = true},
    {"four tiers only batch", 2, 2, 16, 16, 4, 0, 70, 1, 0, 33, 33, .causal = true},
    {"four tiers mask", 14, 2, 32, 64, 4, 0, 1030, 1, 1000, 17, 17, .mask = true, .slopes = true,
     .softcap = 2},
    {"prefill", 4, 1, 32, 32, 4, 0, 600, 1, 300, 200, 200, .causal = true, .softcap = 30},
    {"large heads", 2, 1, 256, 512, 3, 0, 120, 1, 100, 3, 40, .mask = true},
    {"many query heads", 71, 1, 16, 16, 3, 0, 120, 1, 100, 3, 2, .mask = true},
    {"no mask, not causal", 4, 2, 32, 32, 3, 0, 200, 2, 150, 7, 4, .sinks = true},
    {"latent f16", 4, 1, 16, 64, 0, TQKV_BUILTIN_F16, 100, 1, 90, 3, 3, .mask = true,
     .is_latent = true},
    {"latent q8", 5, 1, 32, 48, 0, TQKV_BUILTIN_Q8, 150, 2, 77, 40, 40, .causal = true,
     .is_latent = true},
    {"latent decode", 16, 1, 64, 512, 4, 0, 300, 1, 290, 1, 1, .mask = true, .is_latent = true},
    {"latent parts", 3, 1, 16, 32, 4, 0, 3200, 1, 3100, 1, 1, .causal = true, .sinks = true,
     .is_latent = true},
    {"latent prefill", 7, 1, 32, 64, 3, 0, 500, 1, 300, 150, 150, .mask = true, .sinks = true,
     .slopes = true, .softcap = 20, .is_latent = true},
};

static void test_oracle(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const attn_case *c = &cases[i];
        attn_setup s;
        setup(&s, c, 100 + i);
        for (uint32_t stream = 0; stream < c->n_streams; stream++) {
            tqkv_attend_args args = make_args(&s);
            s.scratch = aligned_alloc(TQKV_ALIGN,
                                      tqkv_store_scratch_bytes(s.store, c->n_q, 1) / 64 * 64 + 64);
            args.scratch = s.scratch;
            args.stream = stream;
            const size_t n_out = (size_t)c->n_q * c->n_heads * (c->v_dim + 3);
            for (size_t j = 0; j < n_out; j++)
                s.out[j] = GUARD;
            assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, NULL), TQKV_OK);
            const oracle_rows r = read_rows(&s, stream);
            for (uint32_t q = 0; q < c->n_q; q += 1 + c->n_q / 16)
                for (uint32_t h = 0; h < c->n_heads; h++)
                    check_row(&s, &args, &r, q, h);
            for (size_t j = 0; j < n_out; j++)
                if (j % (c->v_dim + 3) >= c->v_dim)
                    assert_true(s.out[j] == GUARD);
            free(s.scratch);
            free(r.kind);
            free(r.codes);
            free(r.rows[0]);
            free(r.rows[1]);
        }
        teardown(&s);
    }
}

static void test_workers_do_not_matter(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const attn_case *c = &cases[i];
        const size_t n_out = (size_t)c->n_q * c->n_heads * (c->v_dim + 3);
        const tqkv_parallel ways[] = {test_threads(4), test_backwards(3), test_threads(2)};
        attn_setup s;
        setup(&s, c, 200 + i);
        tqkv_attend_args args = make_args(&s);
        args.scratch =
            aligned_alloc(TQKV_ALIGN, tqkv_store_scratch_bytes(s.store, c->n_q, 4) / 64 * 64 + 64);
        assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, NULL), TQKV_OK);
        float *first = get(n_out * sizeof(*first));
        memcpy(first, s.out, n_out * sizeof(*first));
        for (size_t w = 0; w < sizeof(ways) / sizeof(ways[0]); w++) {
            memset(s.out, 0, n_out * sizeof(*first));
            assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, &ways[w]), TQKV_OK);
            assert_memory_equal(first, s.out, n_out * sizeof(*first));
        }
        free(first);
        free(args.scratch);
        teardown(&s);
    }
}

/* Scratch of exactly the size that was asked for, for every number of queries up to it. */
static void check_scratch(const attn_case *c)
{
    attn_setup s;

    setup(&s, c, 5);
    tqkv_attend_args args = make_args(&s);
    const tqkv_parallel parallel = test_threads(3);
    const size_t bytes = tqkv_store_scratch_bytes(s.store, c->n_q, 3);
    uint8_t *memory = aligned_alloc(TQKV_ALIGN, bytes / 64 * 64 + 128);
    args.scratch = memory;
    for (uint32_t n_q = 1; n_q <= c->n_q; n_q += 3) {
        memset(memory + bytes, 0x5a, 64);
        args.n_q = n_q;
        assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, &parallel), TQKV_OK);
        for (int i = 0; i < 64; i++)
            assert_int_equal(memory[bytes + (size_t)i], 0x5a);
    }
    free(memory);
    teardown(&s);
}

static void test_scratch_is_enough(void **state)
{
    static const attn_case both[] = {
        {"scratch", 4, 2, 32, 32, 4, 0, 2100, 1, 2000, 40, 40, .causal = true},
        {"latent", 4, 1, 32, 32, 4, 0, 2100, 1, 2000, 40, 40, .causal = true, .is_latent = true}};

    (void)state;
    check_scratch(&both[0]);
    check_scratch(&both[1]);
}

static void test_latent_arguments(void **state)
{
    static const attn_case c = {"latent", 4, 1, 32, 32, 2,            0,
                                100,      1, 50, 4, 4, .mask = true, .is_latent = true};
    attn_setup s;

    (void)state;
    setup(&s, &c, 8);
    tqkv_attend_args args = make_args(&s);
    args.scratch =
        aligned_alloc(TQKV_ALIGN, tqkv_store_scratch_bytes(s.store, c.n_q, 1) / 64 * 64 + 64);
    assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, NULL), TQKV_OK);
    args.q_latent = NULL;
    assert_int_equal(tqkv_store_attend(s.store, s.batch, &args, NULL), TQKV_ERR_INVALID_ARG);
    free(args.scratch);
    teardown(&s);
}

static void test_bad_arguments(void **state)
{
    static const attn_case c = {"bad", 4, 2, 32, 32, 2, 0, 100, 1, 50, 4, 4, .mask = true};
    attn_setup s;

    (void)state;
    setup(&s, &c, 6);
    tqkv_attend_args good = make_args(&s), bad;
    good.scratch =
        aligned_alloc(TQKV_ALIGN, tqkv_store_scratch_bytes(s.store, c.n_q, 1) / 64 * 64 + 64);
    assert_int_equal(tqkv_store_attend(s.store, s.batch, &good, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_attend(NULL, s.batch, &good, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_attend(s.store, s.batch, NULL, NULL), TQKV_ERR_INVALID_ARG);
#define REFUSED(change)                                                                          \
    do {                                                                                         \
        bad = good;                                                                              \
        change;                                                                                  \
        assert_int_equal(tqkv_store_attend(s.store, s.batch, &bad, NULL), TQKV_ERR_INVALID_ARG); \
    } while (0)
    REFUSED(bad.struct_bytes = 0);
    REFUSED(bad.stream = 1);
    REFUSED(bad.n_cells = c.n_cells + 1);
    REFUSED(bad.q = NULL);
    REFUSED(bad.out = NULL);
    REFUSED(bad.scratch = NULL);
    REFUSED(bad.scratch = (uint8_t *)good.scratch + 4);
    REFUSED(bad.mask_row_stride = c.n_cells - 2);
    REFUSED(bad.q_latent = good.q); /* the layer is not latent */
    REFUSED(bad.scale = NAN);
    REFUSED(bad.softcap = -1);
    const tqkv_parallel broken = {.n_workers = 0};
    assert_int_equal(tqkv_store_attend(s.store, s.batch, &good, &broken), TQKV_ERR_INVALID_ARG);
    good.n_q = 0;
    assert_int_equal(tqkv_store_attend(s.store, s.batch, &good, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_scratch_bytes(NULL, 1, 1), 0);
    free(good.scratch);
    teardown(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_oracle),
        cmocka_unit_test(test_workers_do_not_matter),
        cmocka_unit_test(test_scratch_is_enough),
        cmocka_unit_test(test_bad_arguments),
        cmocka_unit_test(test_latent_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
