/* SPDX-License-Identifier: Apache-2.0 */
#include "test_paged_engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn_tile.h"
#include "codec/layer_codec.h"
#include "test_memory.h"
#include "test_rounding.h"
#include "test_store_make.h"

#define CONDITION 30.0

static const uint32_t tier_tokens[] = {20, 33, 50};

static void *get(size_t bytes)
{
    void *p = NULL;

    assert_int_equal(posix_memalign(&p, TQKV_ALIGN, bytes + TQKV_ALIGN), 0);
    memset(p, 0, bytes + TQKV_ALIGN);
    return p;
}

static uint32_t dim_of(const test_engine *e, int side)
{
    return side == 0 ? e->c->k_dim : e->c->v_dim;
}

/* Floats of one query of one head. */
static uint32_t query_dim(const test_paged_case *c)
{
    return c->k_dim + (c->is_latent ? c->v_dim : 0);
}

static void make_plan(test_engine *e)
{
    const test_paged_case *c = e->c;
    tqkv_plan_layer shape = test_shape(c->n_heads, c->n_kv_heads, c->k_dim, c->v_dim);

    shape.window = c->window;
    shape.is_latent = c->is_latent;
    if (c->n_tiers == 0)
        assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &e->plan), TQKV_OK);
    else
        assert_int_equal(test_tiered_plan(7, &shape, c->n_tiers, tier_tokens, 4, 64, &e->plan),
                         TQKV_OK);
}

tqkv_paged_config test_paged_config(const test_engine *e)
{
    tqkv_paged_config config;

    tqkv_paged_config_init(&config);
    config.plan = e->plan;
    config.block_tokens = e->c->block_tokens;
    config.n_blocks = e->n_blocks;
    for (uint32_t tier = 0; tier < TQKV_TIERS_MAX; tier++)
        config.n_sequences[tier] = e->c->n_sequences;
    config.n_drafts = e->c->n_drafts;
    config.n_batch_tokens = TEST_SEQS_MAX * TEST_NEW_MAX;
    return config;
}

void test_paged_setup(test_engine *e, const test_paged_case *c, uint64_t seed)
{
    memset(e, 0, sizeof(*e));
    e->c = c;
    e->random.state = seed;
    e->n_blocks = TEST_SEQS_MAX * TEST_LEN_MAX / c->block_tokens + 3;
    make_plan(e);
    const tqkv_paged_config config = test_paged_config(e);
    assert_int_equal(tqkv_codec_create(e->plan, 0, NULL, NULL, &e->codec), TQKV_OK);
    assert_int_equal(tqkv_paged_create(&config, &e->paged), TQKV_OK);
    e->stride = tqkv_paged_block_bytes(e->paged) + 24;
    e->memory = get(e->n_blocks * e->stride + 8);
    for (int side = 0; side < 2; side++) {
        const size_t floats = (size_t)c->n_kv_heads * dim_of(e, side);
        e->rows[side] = get((size_t)e->n_blocks * c->block_tokens * floats * sizeof(float));
        e->new_rows[side] = get((size_t)TEST_SEQS_MAX * TEST_NEW_MAX * floats * sizeof(float));
    }
    e->q = get((size_t)TEST_SEQS_MAX * TEST_NEW_MAX * c->n_heads * query_dim(c) * sizeof(float));
    e->out = get((size_t)TEST_SEQS_MAX * TEST_NEW_MAX * c->n_heads * c->v_dim * sizeof(float));
    e->lse = get((size_t)TEST_SEQS_MAX * TEST_NEW_MAX * c->n_heads * sizeof(float));
    e->sinks = get(c->n_heads * sizeof(float));
    test_fill_normal(&e->random, 1, e->sinks, c->n_heads);
    e->scratch = get(tqkv_paged_scratch_bytes(e->paged, TEST_NEW_MAX, TEST_LEN_MAX, 3));
}

void test_paged_teardown(test_engine *e)
{
    tqkv_paged_destroy(e->paged);
    tqkv_codec_destroy(e->codec);
    tqkv_plan_destroy(e->plan);
    void *all[] = {e->memory, e->rows[0], e->rows[1], e->new_rows[0], e->new_rows[1],
                   e->q,      e->out,     e->lse,     e->sinks,       e->scratch};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

static int32_t take_block(test_engine *e)
{
    uint32_t block = test_random_below(&e->random, e->n_blocks);

    while (e->users[block] > 0)
        block = (block + 1) % e->n_blocks;
    e->users[block] = 1;
    return (int32_t)block;
}

void test_end_sequence(test_engine *e, uint32_t s)
{
    test_sequence *seq = &e->seqs[s];

    for (uint32_t i = 0; i * e->c->block_tokens < seq->len; i++)
        e->users[seq->table[i]]--;
    seq->len = 0;
}

void test_share_blocks(test_engine *e, uint32_t s, const test_sequence *other, uint32_t n)
{
    test_sequence *seq = &e->seqs[s];

    for (uint32_t i = 0; i < n; i++) {
        seq->table[i] = other->table[i];
        e->users[seq->table[i]]++;
    }
    seq->len = n * e->c->block_tokens;
}

void test_begin_sequence(test_engine *e, uint32_t s)
{
    const test_sequence *other = &e->seqs[test_random_below(&e->random, TEST_SEQS_MAX)];
    const uint32_t n_whole = other->len / e->c->block_tokens;

    if (n_whole > 0 && test_random_below(&e->random, 2) == 0)
        test_share_blocks(e, s, other, 1 + test_random_below(&e->random, n_whole));
}

static uint32_t slot_of(const test_engine *e, const test_sequence *seq, uint32_t position)
{
    return (uint32_t)seq->table[position / e->c->block_tokens] * e->c->block_tokens +
           position % e->c->block_tokens;
}

/* Tier of the blocks. */
static uint32_t old_tier(const test_engine *e)
{
    uint32_t tier = 0, n = 0;

    while (tier + 1 < e->c->n_tiers) {
        n += tier_tokens[tier];
        if (e->c->window != 0 && n >= e->c->window)
            break;
        tier++;
    }
    return tier;
}

/* Whether copies `i` have the 16 tokens at index when the newest are at index `newest`. */
static bool reaches(const test_engine *e, uint32_t i, uint32_t index, uint32_t newest)
{
    uint32_t n = 0;

    if (old_tier(e) == 0 || e->c->n_sequences == 0)
        return false;
    if (i == TEST_SINKS || index == 0) /* 4 sinks: the first block */
        return i == TEST_SINKS && index == 0;
    if (i >= old_tier(e))
        return false;
    for (uint32_t tier = 0; tier <= i; tier++)
        n += tier_tokens[tier];
    return newest - index <= (n + TEST_BLOCK - 1) / TEST_BLOCK;
}

/* Whether a batch whose newest token of the sequence is in block `newest` fills that copy. */
static bool is_copied(const test_engine *e, uint32_t i, uint32_t index, uint32_t newest)
{
    const uint32_t page_blocks = e->c->block_tokens / TEST_BLOCK;
    const uint32_t next_page = (index / page_blocks + 1) * page_blocks;

    return reaches(e, i, index, newest) ||
           (i == 0 && next_page <= newest && reaches(e, i, index, next_page));
}

uint32_t test_lost_copies(const test_engine *e, const test_sequence *seq, uint32_t n)
{
    uint32_t n_lost = 0;

    for (uint32_t p = 0; p < n; p += TEST_BLOCK) {
        const uint32_t left = n - p;
        const uint32_t wanted = (1u << (left < TEST_BLOCK ? left : TEST_BLOCK)) - 1;
        for (uint32_t i = 0; i <= TEST_SINKS; i += TEST_SINKS)
            n_lost += reaches(e, i, p / TEST_BLOCK, n / TEST_BLOCK) &&
                      (e->held[i][slot_of(e, seq, p) / TEST_BLOCK] & wanted) != wanted;
    }
    return n_lost;
}

uint32_t test_check_lost(const test_engine *e, const test_sequence *seq)
{
    uint32_t n_lost = 0;

    for (uint32_t n = 0; n < seq->len + TEST_BLOCK; n += TEST_BLOCK) {
        const uint32_t n_tokens = n < seq->len ? n : seq->len;
        const uint32_t want = test_lost_copies(e, seq, n_tokens);
        assert_int_equal(tqkv_paged_lost(e->paged, seq->table, n_tokens), want);
        if (n_tokens % e->c->block_tokens == 0 && e->c->n_sequences == TEST_ALL)
            assert_int_equal(want, 0);
        n_lost += want;
    }
    return n_lost;
}

void test_add_to_batch(test_engine *e, uint32_t s, uint32_t n)
{
    test_sequence *seq = &e->seqs[s];
    const uint32_t first = seq->len, b = e->n_seqs, token = (uint32_t)e->query_start[b];

    for (uint32_t p = first; p < first + n; p++) {
        if (p % e->c->block_tokens == 0)
            seq->table[p / e->c->block_tokens] = take_block(e);
        const uint32_t slot = slot_of(e, seq, p);
        for (int side = 0; side < 2; side++) {
            const size_t floats = (size_t)e->c->n_kv_heads * dim_of(e, side);
            float *row = e->new_rows[side] + (token + p - first) * floats;
            test_fill_normal(&e->random, 1, row, floats);
            memcpy(e->rows[side] + slot * floats, row, floats * sizeof(*row));
        }
        for (uint32_t i = 0; i <= TEST_SINKS; i++) {
            uint16_t *held = &e->held[i][slot / TEST_BLOCK];
            *held &= (uint16_t)((1u << slot % TEST_BLOCK) - 1);
            if (is_copied(e, i, p / TEST_BLOCK, (first + n - 1) / TEST_BLOCK))
                *held |= (uint16_t)(1u << slot % TEST_BLOCK);
        }
    }
    seq->len += n;
    e->of[b] = s;
    e->query_start[b + 1] = (int32_t)(token + n);
    e->seq_lens[b] = (int32_t)seq->len;
    memcpy(e->tables[b], seq->table, sizeof(seq->table));
    e->n_seqs++;
}

tqkv_paged_batch test_paged_batch(test_engine *e)
{
    tqkv_paged_batch batch;

    tqkv_paged_batch_init(&batch);
    batch.blocks = e->memory + 8;
    batch.block_stride_bytes = e->stride;
    batch.n_seqs = e->n_seqs;
    batch.query_start = e->query_start;
    batch.seq_lens = e->seq_lens;
    batch.block_table = e->tables[0];
    batch.block_table_stride = TEST_LEN_MAX / TEST_BLOCK;
    batch.k = e->new_rows[0];
    batch.v = e->new_rows[1];
    batch.decode_tokens_max = 1 + e->c->n_drafts;
    return batch;
}

tqkv_attend_args test_paged_args(const test_engine *e)
{
    const test_paged_case *c = e->c;
    tqkv_attend_args args;

    tqkv_attend_args_init(&args);
    args.n_q = (uint32_t)e->query_start[e->n_seqs];
    args.q = e->q;
    args.q_latent = c->is_latent ? e->q + c->k_dim : NULL;
    args.q_head_stride = query_dim(c);
    args.q_token_stride = (size_t)c->n_heads * args.q_head_stride;
    args.out = e->out;
    args.out_head_stride = c->v_dim;
    args.out_token_stride = (size_t)c->n_heads * c->v_dim;
    args.lse = e->lse;
    args.sinks = c->sinks ? e->sinks : NULL;
    args.scale = 1.0f / sqrtf((float)query_dim(c));
    args.softcap = c->softcap;
    args.scratch = e->scratch;
    return args;
}

static int32_t base_of(const test_engine *e, uint32_t position)
{
    return e->c->n_tiers > 0 ? (int32_t)(position / 64 * 64) : 0;
}

/* The row that a query reads: as it came, or through the codec. Returns the scale; codes: out. */
static uint8_t read_row(const test_engine *e, const test_sequence *seq, int side, uint32_t g,
                        uint32_t position, bool own, uint32_t tier, float *row, uint8_t *codes)
{
    const uint32_t dim = dim_of(e, side);
    const float *x =
        e->rows[side] + ((size_t)slot_of(e, seq, position) * e->c->n_kv_heads + g) * dim;
    const int32_t base = base_of(e, position);
    uint8_t scale;

    if (own) {
        memcpy(row, x, dim * sizeof(*row));
        return 0;
    }
    assert_int_equal(
        tqkv_codec_encode(e->codec, g, (tqkv_side)side, tier, base, x, dim, 1, &scale, codes, NULL),
        TQKV_OK);
    assert_int_equal(
        tqkv_codec_decode(e->codec, g, (tqkv_side)side, tier, base, &scale, codes, 1, row, dim),
        TQKV_OK);
    return scale;
}

/* Tier of the 16 tokens at an index, of which the first n are read. */
static uint32_t tier_of(const test_engine *e, const test_sequence *seq, uint32_t index, uint32_t n,
                        uint32_t newest)
{
    const uint32_t needed = (1u << n) - 1;
    const uint32_t block = slot_of(e, seq, index * TEST_BLOCK) / TEST_BLOCK;

    for (uint32_t i = 0; i <= TEST_SINKS; i++)
        if (reaches(e, i, index, newest) && (e->held[i][block] & needed) == needed)
            return i == TEST_SINKS ? 0 : i;
    return old_tier(e);
}

/* Adds to *terms the sizes of what is summed. */
static double dot(const float *a, const float *b, uint32_t n, double *terms)
{
    double sum = 0;

    for (uint32_t d = 0; d < n; d++) {
        sum += (double)a[d] * (double)b[d];
        *terms += fabs((double)a[d] * (double)b[d]);
    }
    return sum;
}

/* Softmax score of a key; terms: out, the sum of the sizes of its terms. */
static double score(const test_paged_case *c, const float *q, const float *k, const float *v,
                    double *terms)
{
    const double scale = 1.0 / sqrt((double)query_dim(c));
    double s;

    *terms = 0;
    s = dot(q, k, c->k_dim, terms);
    if (c->is_latent)
        s += dot(q + c->k_dim, v, c->v_dim, terms);
    s *= scale;
    *terms *= scale;
    return c->softcap > 0 ? (double)c->softcap * tanh(s / (double)c->softcap) : s;
}

/* Whether the task of token i of n that are attended together reads codes as integers. */
static bool has_few_rows(const test_engine *e, uint32_t i, uint32_t n, uint32_t h)
{
    const uint32_t group = e->c->n_heads / e->c->n_kv_heads;
    const uint32_t block = tqkvi_attn_rows(&e->codec->layer->shape);
    const uint32_t first = (i * group + h % group) / block * block;

    return !e->c->is_latent &&
           (n * group - first < block ? n * group - first : block) <= TQKVI_CODE_ROWS_MAX;
}

/* is_exact: rows as they came, and the error that halves of them have, instead of what is stored. */
static void check_row(const test_engine *e, uint32_t b, uint32_t token, uint32_t h, bool is_exact)
{
    const test_paged_case *c = e->c;
    const test_sequence *seq = &e->seqs[e->of[b]];
    const uint32_t n_new = (uint32_t)(e->query_start[b + 1] - e->query_start[b]);
    const uint32_t position =
        (uint32_t)e->seq_lens[b] - n_new + (token - (uint32_t)e->query_start[b]);
    const uint32_t start = n_new <= 1 + c->n_drafts ? position : (uint32_t)e->seq_lens[b] - n_new;
    const uint32_t first = c->window && position >= c->window ? position - c->window + 1 : 0;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads);
    const double scale = 1.0 / sqrt((double)query_dim(c));
    static double scores[TEST_LEN_MAX];
    static float values[TEST_LEN_MAX][TEST_DIM_MAX];
    const double half = is_exact ? ldexp(1, -11) : 0;
    double top = c->sinks ? (double)e->sinks[h] : -INFINITY, error = 0, sum = 0, terms;
    const float *q = e->q + ((size_t)token * c->n_heads + h) * query_dim(c);
    const bool is_rounded =
        c->n_tiers > 0 && has_few_rows(e, position - start, start == position ? 1 : n_new, h);
    uint8_t codes[2 * 16 * TQKV_UNITS_MAX];
    double largest_q[TQKV_UNITS_MAX], moved[TQKV_UNITS_MAX];
    float k[64];

    for (uint32_t p = first; p <= position; p++) {
        const uint32_t left = start - p / TEST_BLOCK * TEST_BLOCK;
        const bool own = p >= start;
        const uint32_t tier =
            own ? 0
                : tier_of(e, seq, p / TEST_BLOCK, left < TEST_BLOCK ? left : TEST_BLOCK,
                          start / TEST_BLOCK);
        read_row(e, seq, 1, g, p, own || is_exact, tier, values[p], codes);
        const uint8_t size = read_row(e, seq, 0, g, p, own || is_exact, tier, k, codes);
        double slack = 0;
        if (is_rounded && !own) {
            test_largest_query(e->codec, g, true, base_of(e, p), q, largest_q, moved);
            slack = test_rounding_slack(e->codec, g, tier, size, codes, largest_q, moved) * scale;
        }
        scores[p] = score(c, q, k, values[p], &terms);
        top = scores[p] > top ? scores[p] : top;
        const double bound =
            slack + half * terms +
            (double)FLT_EPSILON * (CONDITION * (terms + 1) * 8 + fabs(scores[p]) * 4);
        error = bound > error ? bound : error;
    }
    for (uint32_t p = first; p <= position; p++)
        sum += exp(scores[p] - top);
    sum += c->sinks ? exp((double)e->sinks[h] - top) : 0;
    for (uint32_t d = 0; d < c->v_dim; d++) {
        double want = 0, largest = 0;
        for (uint32_t p = first; p <= position; p++) {
            want += exp(scores[p] - top) / sum * (double)values[p][d];
            largest = fabs((double)values[p][d]) > largest ? fabs((double)values[p][d]) : largest;
        }
        const double got = (double)e->out[((size_t)token * c->n_heads + h) * c->v_dim + d];
        /* Weights are rounded too, each by at most 1/254 of the largest: six standard deviations. */
        const double weights =
            is_rounded ? 6 * largest * sqrt(position / 12.0) / TQKVK_COARSE_WEIGHT_MAX : 0;
        const double bound =
            2 * (error + CONDITION * 8 * (double)FLT_EPSILON) * (largest + 1) + weights +
            half * largest;
        if (!(fabs(got - want) <= bound))
            fail_msg("%s: position %u head %u d %u: %.9g, not %.9g (bound %.3g)", c->name, position,
                     h, d, got, want, bound);
    }
    const double got = (double)e->lse[(size_t)token * c->n_heads + h];
    if (!(fabs(got - (top + log(sum))) <= 2 * error + 8 * (double)FLT_EPSILON * (fabs(got) + 1)))
        fail_msg("%s: position %u head %u: lse %.9g, not %.9g", c->name, position, h, got,
                 top + log(sum));
}

void test_check_row(const test_engine *e, uint32_t b, uint32_t token, uint32_t h)
{
    check_row(e, b, token, h, false);
}

void test_check_exact(const test_engine *e, uint32_t b, uint32_t token, uint32_t h)
{
    check_row(e, b, token, h, true);
}

void test_run_batch(test_engine *e, const tqkv_parallel *parallel)
{
    const tqkv_paged_batch batch = test_paged_batch(e);
    const tqkv_attend_args args = test_paged_args(e);

    test_fill_normal(&e->random, 1, e->q, (size_t)args.n_q * args.q_token_stride);
    assert_int_equal(tqkv_paged_write(e->paged, &batch, parallel), TQKV_OK);
    assert_int_equal(tqkv_paged_attend(e->paged, &batch, &args, parallel), TQKV_OK);
}
