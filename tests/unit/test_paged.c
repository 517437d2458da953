/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small engine with block tables: sequences come and go, share full blocks, arrive in chunks and
 * take drafts back. Every output is compared with the sum in double over rows that went through
 * the public codec, at the tier that the header promises for their distance.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn_tile.h"
#include "test_memory.h"
#include "test_rounding.h"
#include "test_store_make.h"

#define BLOCK 16
#define SEQS_MAX 4
#define LEN_MAX 512
#define NEW_MAX 96
#define SINKS 3  /* index of the sinks among the copies */
#define ALL 1000 /* sequences: a copy for every block, none is ever replaced */
#define CONDITION 30.0

typedef struct paged_case {
    const char *name;
    uint32_t n_heads, n_kv_heads, k_dim, v_dim;
    uint32_t n_tiers; /* 0: built-in f16 */
    uint32_t block_tokens, n_sequences, window;
    uint32_t n_drafts;
    bool sinks;
    float softcap;
} paged_case;

static const uint32_t tier_tokens[] = {20, 33, 50};

typedef struct sequence {
    uint32_t len; /* 0: no sequence */
    int32_t table[LEN_MAX / BLOCK];
} sequence;

typedef struct engine {
    const paged_case *c;
    tqkv_plan *plan;
    tqkv_codec *codec;
    tqkv_paged *paged;
    test_random random;
    uint32_t n_blocks;
    size_t stride;
    uint8_t *memory;                /* the blocks, from byte 8 on */
    uint32_t users[256];            /* sequences that hold a block */
    float *rows[2];                 /* [n_blocks * block_tokens][n_kv_heads][dim] as they came */
    uint16_t held[SINKS + 1][4096]; /* tokens that a copy of 16 tokens has, by tier, then sinks */
    sequence seqs[SEQS_MAX];
    /* The batch. */
    uint32_t n_seqs, of[SEQS_MAX];
    int32_t query_start[SEQS_MAX + 1], seq_lens[SEQS_MAX];
    int32_t tables[SEQS_MAX][LEN_MAX / BLOCK];
    float *new_rows[2], *q, *out, *lse, *sinks;
    void *scratch;
} engine;

static void *get(size_t bytes)
{
    void *p = NULL;

    assert_int_equal(posix_memalign(&p, TQKV_ALIGN, bytes + TQKV_ALIGN), 0);
    memset(p, 0, bytes + TQKV_ALIGN);
    return p;
}

static uint32_t dim_of(const engine *e, int side)
{
    return side == 0 ? e->c->k_dim : e->c->v_dim;
}

static void make_plan(engine *e)
{
    const paged_case *c = e->c;
    tqkv_plan_layer shape = test_shape(c->n_heads, c->n_kv_heads, c->k_dim, c->v_dim);

    shape.window = c->window;
    if (c->n_tiers == 0)
        assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &e->plan), TQKV_OK);
    else
        assert_int_equal(test_tiered_plan(7, &shape, c->n_tiers, tier_tokens, 4, 64, &e->plan),
                         TQKV_OK);
}

static tqkv_paged_config make_config(const engine *e)
{
    tqkv_paged_config config;

    tqkv_paged_config_init(&config);
    config.plan = e->plan;
    config.block_tokens = e->c->block_tokens;
    config.n_blocks = e->n_blocks;
    for (uint32_t tier = 0; tier < TQKV_TIERS_MAX; tier++)
        config.n_sequences[tier] = e->c->n_sequences;
    config.n_drafts = e->c->n_drafts;
    config.n_batch_tokens = SEQS_MAX * NEW_MAX;
    return config;
}

static void setup(engine *e, const paged_case *c, uint64_t seed)
{
    memset(e, 0, sizeof(*e));
    e->c = c;
    e->random.state = seed;
    e->n_blocks = SEQS_MAX * LEN_MAX / c->block_tokens + 3;
    make_plan(e);
    const tqkv_paged_config config = make_config(e);
    assert_int_equal(tqkv_codec_create(e->plan, 0, NULL, NULL, &e->codec), TQKV_OK);
    assert_int_equal(tqkv_paged_create(&config, &e->paged), TQKV_OK);
    e->stride = tqkv_paged_block_bytes(e->paged) + 24;
    e->memory = get(e->n_blocks * e->stride + 8);
    for (int side = 0; side < 2; side++) {
        const size_t floats = (size_t)c->n_kv_heads * dim_of(e, side);
        e->rows[side] = get((size_t)e->n_blocks * c->block_tokens * floats * sizeof(float));
        e->new_rows[side] = get((size_t)SEQS_MAX * NEW_MAX * floats * sizeof(float));
    }
    e->q = get((size_t)SEQS_MAX * NEW_MAX * c->n_heads * c->k_dim * sizeof(float));
    e->out = get((size_t)SEQS_MAX * NEW_MAX * c->n_heads * c->v_dim * sizeof(float));
    e->lse = get((size_t)SEQS_MAX * NEW_MAX * c->n_heads * sizeof(float));
    e->sinks = get(c->n_heads * sizeof(float));
    test_fill_normal(&e->random, 1, e->sinks, c->n_heads);
    e->scratch = get(tqkv_paged_scratch_bytes(e->paged, NEW_MAX, LEN_MAX, 3));
}

static void teardown(engine *e)
{
    tqkv_paged_destroy(e->paged);
    tqkv_codec_destroy(e->codec);
    tqkv_plan_destroy(e->plan);
    void *all[] = {e->memory, e->rows[0], e->rows[1], e->new_rows[0], e->new_rows[1],
                   e->q,      e->out,     e->lse,     e->sinks,       e->scratch};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

static int32_t take_block(engine *e)
{
    uint32_t block = test_random_below(&e->random, e->n_blocks);

    while (e->users[block] > 0)
        block = (block + 1) % e->n_blocks;
    e->users[block] = 1;
    return (int32_t)block;
}

static void end_sequence(engine *e, uint32_t s)
{
    sequence *seq = &e->seqs[s];

    for (uint32_t i = 0; i * e->c->block_tokens < seq->len; i++)
        e->users[seq->table[i]]--;
    seq->len = 0;
}

/* An empty sequence finds the first n blocks of another one in the prefix cache. */
static void share_blocks(engine *e, uint32_t s, const sequence *other, uint32_t n)
{
    sequence *seq = &e->seqs[s];

    for (uint32_t i = 0; i < n; i++) {
        seq->table[i] = other->table[i];
        e->users[seq->table[i]]++;
    }
    seq->len = n * e->c->block_tokens;
}

/* An empty sequence stays so, or finds some blocks. */
static void begin_sequence(engine *e, uint32_t s)
{
    const sequence *other = &e->seqs[test_random_below(&e->random, SEQS_MAX)];
    const uint32_t n_whole = other->len / e->c->block_tokens;

    if (n_whole > 0 && test_random_below(&e->random, 2) == 0)
        share_blocks(e, s, other, 1 + test_random_below(&e->random, n_whole));
}

static uint32_t slot_of(const engine *e, const sequence *seq, uint32_t position)
{
    return (uint32_t)seq->table[position / e->c->block_tokens] * e->c->block_tokens +
           position % e->c->block_tokens;
}

/* Whether copies `i` have the 16 tokens at index when the newest are at index `newest`. */
static bool reaches(const engine *e, uint32_t i, uint32_t index, uint32_t newest)
{
    uint32_t n = 0;

    if (e->c->n_tiers < 2 || e->c->n_sequences == 0)
        return false;
    if (i == SINKS || index == 0) /* 4 sinks: the first block */
        return i == SINKS && index == 0;
    if (i + 1 >= e->c->n_tiers)
        return false;
    for (uint32_t tier = 0; tier <= i; tier++)
        n += tier_tokens[tier];
    return newest - index <= (n + BLOCK - 1) / BLOCK;
}

/* Copies that the token behind the first n of a sequence lacks, where none is ever replaced. */
static uint32_t lost_copies(const engine *e, const sequence *seq, uint32_t n)
{
    uint32_t n_lost = 0;

    for (uint32_t p = 0; p < n; p += BLOCK) {
        const uint32_t left = n - p;
        const uint32_t wanted = (1u << (left < BLOCK ? left : BLOCK)) - 1;
        for (uint32_t i = 0; i <= SINKS; i += SINKS)
            n_lost += reaches(e, i, p / BLOCK, n / BLOCK) &&
                      (e->held[i][slot_of(e, seq, p) / BLOCK] & wanted) != wanted;
    }
    return n_lost;
}

/* What a prefix cache would find: whole blocks of the engine, and all. Returns copies lost in all. */
static uint32_t check_lost(const engine *e, const sequence *seq)
{
    uint32_t n_lost = 0;

    for (uint32_t n = 0; n < seq->len + e->c->block_tokens; n += e->c->block_tokens) {
        const uint32_t n_tokens = n < seq->len ? n : seq->len;
        const uint32_t want = lost_copies(e, seq, n_tokens);
        assert_int_equal(tqkv_paged_lost(e->paged, seq->table, n_tokens), want);
        n_lost += want;
    }
    return n_lost;
}

/* n new tokens of a sequence join the batch. */
static void add_to_batch(engine *e, uint32_t s, uint32_t n)
{
    sequence *seq = &e->seqs[s];
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
        for (uint32_t i = 0; i <= SINKS; i++) {
            uint16_t *held = &e->held[i][slot / BLOCK];
            *held &= (uint16_t)((1u << slot % BLOCK) - 1);
            if (reaches(e, i, p / BLOCK, (first + n - 1) / BLOCK))
                *held |= (uint16_t)(1u << slot % BLOCK);
        }
    }
    seq->len += n;
    e->of[b] = s;
    e->query_start[b + 1] = (int32_t)(token + n);
    e->seq_lens[b] = (int32_t)seq->len;
    memcpy(e->tables[b], seq->table, sizeof(seq->table));
    e->n_seqs++;
}

static tqkv_paged_batch make_batch(engine *e)
{
    tqkv_paged_batch batch;

    tqkv_paged_batch_init(&batch);
    batch.blocks = e->memory + 8;
    batch.block_stride_bytes = e->stride;
    batch.n_seqs = e->n_seqs;
    batch.query_start = e->query_start;
    batch.seq_lens = e->seq_lens;
    batch.block_table = e->tables[0];
    batch.block_table_stride = LEN_MAX / BLOCK;
    batch.k = e->new_rows[0];
    batch.v = e->new_rows[1];
    batch.decode_tokens_max = 1 + e->c->n_drafts;
    return batch;
}

static tqkv_attend_args make_args(const engine *e)
{
    const paged_case *c = e->c;
    tqkv_attend_args args;

    tqkv_attend_args_init(&args);
    args.n_q = (uint32_t)e->query_start[e->n_seqs];
    args.q = e->q;
    args.q_head_stride = c->k_dim;
    args.q_token_stride = (size_t)c->n_heads * c->k_dim;
    args.out = e->out;
    args.out_head_stride = c->v_dim;
    args.out_token_stride = (size_t)c->n_heads * c->v_dim;
    args.lse = e->lse;
    args.sinks = c->sinks ? e->sinks : NULL;
    args.scale = 1.0f / sqrtf((float)c->k_dim);
    args.softcap = c->softcap;
    args.scratch = e->scratch;
    return args;
}

static int32_t base_of(const engine *e, uint32_t position)
{
    return e->c->n_tiers > 0 ? (int32_t)(position / 64 * 64) : 0;
}

/* The row that a query reads: as it came, or through the codec. Returns the scale; codes: out. */
static uint8_t read_row(const engine *e, const sequence *seq, int side, uint32_t g,
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
static uint32_t tier_of(const engine *e, const sequence *seq, uint32_t index, uint32_t n,
                        uint32_t newest)
{
    const uint32_t needed = (1u << n) - 1;
    const uint32_t block = slot_of(e, seq, index * BLOCK) / BLOCK;

    for (uint32_t i = 0; i <= SINKS; i++)
        if (reaches(e, i, index, newest) && (e->held[i][block] & needed) == needed)
            return i == SINKS ? 0 : i;
    return e->c->n_tiers > 0 ? e->c->n_tiers - 1 : 0;
}

static double dot(const float *a, const float *b, uint32_t n, double *terms)
{
    double sum = 0;

    *terms = 0;
    for (uint32_t d = 0; d < n; d++) {
        sum += (double)a[d] * (double)b[d];
        *terms += fabs((double)a[d] * (double)b[d]);
    }
    return sum;
}

/* Whether the task of token i of n that are attended together reads codes as integers. */
static bool has_few_rows(const engine *e, uint32_t i, uint32_t n, uint32_t h)
{
    const uint32_t group = e->c->n_heads / e->c->n_kv_heads;
    const uint32_t block = tqkvi_attn_rows(&e->codec->layer->shape);
    const uint32_t first = (i * group + h % group) / block * block;

    return (n * group - first < block ? n * group - first : block) <= TQKVI_CODE_ROWS_MAX;
}

/* One query head of one new token of the batch. */
static void check_row(const engine *e, uint32_t b, uint32_t token, uint32_t h)
{
    const paged_case *c = e->c;
    const sequence *seq = &e->seqs[e->of[b]];
    const uint32_t n_new = (uint32_t)(e->query_start[b + 1] - e->query_start[b]);
    const uint32_t position =
        (uint32_t)e->seq_lens[b] - n_new + (token - (uint32_t)e->query_start[b]);
    const uint32_t start = n_new <= 1 + c->n_drafts ? position : (uint32_t)e->seq_lens[b] - n_new;
    const uint32_t first = c->window && position >= c->window ? position - c->window + 1 : 0;
    const uint32_t g = h / (c->n_heads / c->n_kv_heads);
    const double scale = 1.0 / sqrt((double)c->k_dim);
    static double scores[LEN_MAX];
    static float values[LEN_MAX][64];
    double top = c->sinks ? (double)e->sinks[h] : -INFINITY, error = 0, sum = 0, terms;
    const float *q = e->q + ((size_t)token * c->n_heads + h) * c->k_dim;
    const bool is_rounded =
        c->n_tiers > 0 && has_few_rows(e, position - start, start == position ? 1 : n_new, h);
    uint8_t codes[2 * 16 * TQKV_UNITS_MAX];
    double largest_q[TQKV_UNITS_MAX];
    float k[64];

    for (uint32_t p = first; p <= position; p++) {
        const uint32_t left = start - p / BLOCK * BLOCK;
        const bool own = p >= start;
        const uint32_t tier =
            own ? 0 : tier_of(e, seq, p / BLOCK, left < BLOCK ? left : BLOCK, start / BLOCK);
        read_row(e, seq, 1, g, p, own, tier, values[p], codes);
        const uint8_t size = read_row(e, seq, 0, g, p, own, tier, k, codes);
        double slack = 0;
        if (is_rounded && !own) {
            test_largest_query(e->codec, g, true, base_of(e, p), q, largest_q);
            slack = test_rounding_slack(e->codec, g, tier, size, codes, largest_q) * scale;
        }
        double s = dot(q, k, c->k_dim, &terms);
        s *= scale;
        if (c->softcap > 0)
            s = (double)c->softcap * tanh(s / (double)c->softcap);
        scores[p] = s;
        top = s > top ? s : top;
        const double bound =
            slack + (double)FLT_EPSILON * (CONDITION * (terms * scale + 1) * 8 + fabs(s) * 4);
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
        /* Weights are rounded too: each by at most 1/32766 of the largest. */
        const double weights = is_rounded ? position * largest / TQKVK_WEIGHT_MAX : 0;
        const double bound =
            2 * (error + CONDITION * 8 * (double)FLT_EPSILON) * (largest + 1) + weights;
        if (!(fabs(got - want) <= bound))
            fail_msg("%s: position %u head %u d %u: %.9g, not %.9g (bound %.3g)", c->name, position,
                     h, d, got, want, bound);
    }
    const double got = (double)e->lse[(size_t)token * c->n_heads + h];
    if (!(fabs(got - (top + log(sum))) <= 2 * error + 8 * (double)FLT_EPSILON * (fabs(got) + 1)))
        fail_msg("%s: position %u head %u: lse %.9g, not %.9g", c->name, position, h, got,
                 top + log(sum));
}

static void run_batch(engine *e, const tqkv_parallel *parallel)
{
    const tqkv_paged_batch batch = make_batch(e);
    const tqkv_attend_args args = make_args(e);

    test_fill_normal(&e->random, 1, e->q, (size_t)args.n_q * e->c->n_heads * e->c->k_dim);
    assert_int_equal(tqkv_paged_write(e->paged, &batch, parallel), TQKV_OK);
    assert_int_equal(tqkv_paged_attend(e->paged, &batch, &args, parallel), TQKV_OK);
}

/* What a scheduler might do in one step. */
static void step(engine *e)
{
    e->n_seqs = 0;
    for (uint32_t s = 0; s < SEQS_MAX; s++) {
        sequence *seq = &e->seqs[s];
        const uint32_t dice = test_random_below(&e->random, 20);
        if (dice == 0 || seq->len + NEW_MAX > LEN_MAX)
            end_sequence(e, s);
        if (seq->len == 0)
            begin_sequence(e, s);
        if (dice == 1)
            continue; /* not scheduled */
        if (seq->len == 0 || dice < 6)
            add_to_batch(e, s, 1 + test_random_below(&e->random, NEW_MAX - 1));
        else
            add_to_batch(e, s, 1 + test_random_below(&e->random, e->c->n_drafts + 1));
    }
}

/* Drafts that were not accepted: the same positions are written again in a later step. */
static void take_back(engine *e)
{
    for (uint32_t b = 0; b < e->n_seqs; b++) {
        const uint32_t n = (uint32_t)(e->query_start[b + 1] - e->query_start[b]);
        sequence *seq = &e->seqs[e->of[b]];
        if (n < 2 || n > 1 + e->c->n_drafts)
            continue;
        const uint32_t left = seq->len - test_random_below(&e->random, n);
        for (uint32_t p = left; p < seq->len; p++)
            if (p % e->c->block_tokens == 0)
                e->users[seq->table[p / e->c->block_tokens]]--;
        seq->len = left;
    }
}

static const paged_case cases[] = {
    {"f16", 4, 2, 32, 48, 0, 16, 4, 0, 0, false, 0},
    {"one tier", 2, 1, 32, 32, 1, 32, 4, 0, 2, true, 0},
    {"four tiers", 4, 2, 32, 32, 4, 32, ALL, 0, 3, false, 0},
    {"four tiers, large blocks", 6, 2, 64, 32, 4, 128, ALL, 0, 5, true, 5},
    {"no copies", 4, 2, 32, 32, 4, 16, 0, 0, 1, false, 0},
    {"window", 4, 2, 32, 32, 3, 32, ALL, 70, 2, false, 0},
    {"window in the raw rows", 2, 2, 16, 16, 2, 16, ALL, 9, 0, true, 3},
};

static void test_engine(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        static engine e;
        setup(&e, &cases[i], 300 + i);
        const tqkv_parallel ways[] = {test_threads(3), test_backwards(3)};
        uint32_t n_lost = 0;
        for (uint32_t n = 0; n < 60; n++) {
            step(&e);
            run_batch(&e, n % 3 < 2 ? &ways[n % 3] : NULL);
            for (uint32_t b = 0; b < e.n_seqs; b++)
                for (int32_t t = e.query_start[b]; t < e.query_start[b + 1]; t += 1 + t / 8)
                    check_row(&e, b, (uint32_t)t, test_random_below(&e.random, e.c->n_heads));
            take_back(&e);
            for (uint32_t s = 0; s < SEQS_MAX && e.c->window == 0; s++)
                n_lost += check_lost(&e, &e.seqs[s]);
        }
        tqkv_paged_stats stats;
        tqkv_paged_get_stats(e.paged, &stats);
        assert_true(stats.n_written > 1000 && stats.n_bad_rows == 0);
        assert_int_equal(stats.n_young > 0, e.c->n_tiers > 1 && e.c->n_sequences > 0);
        assert_int_equal(n_lost > 0, e.c->n_sequences == ALL && e.c->window == 0);
        teardown(&e);
    }
}

/*
 * One long prompt, and sequences behind all of it, most of it and little of it, that decode
 * together; one of them pauses now and then. Returns reads that were shared.
 */
static uint64_t decode_behind_prompt(const paged_case *c)
{
    static engine e;
    const tqkv_parallel ways[] = {test_threads(3), test_backwards(3)};
    const uint32_t n_blocks[] = {0, 320, 256, 64};
    tqkv_paged_stats stats;

    setup(&e, c, 17);
    for (uint32_t at = 0; at < 320; at += 64) {
        e.n_seqs = 0;
        add_to_batch(&e, 0, 64);
        run_batch(&e, NULL);
    }
    for (uint32_t s = 1; s < SEQS_MAX; s++)
        share_blocks(&e, s, &e.seqs[0], n_blocks[s] / c->block_tokens);
    for (uint32_t n = 0; n < 70; n++) {
        e.n_seqs = 0;
        for (uint32_t s = 0; s < SEQS_MAX; s++)
            if (s != n % 5)
                add_to_batch(&e, s, 1);
        run_batch(&e, n % 3 < 2 ? &ways[n % 3] : NULL);
        for (uint32_t b = 0; b < e.n_seqs; b++)
            for (uint32_t h = 0; h < c->n_heads; h++)
                check_row(&e, b, b, h);
    }
    tqkv_paged_get_stats(e.paged, &stats);
    teardown(&e);
    return stats.n_shared;
}

static void test_shared_prefix(void **state)
{
    static const paged_case shared[] = {
        {"shared, f16", 4, 2, 32, 48, 0, 16, 4, 0, 0, false, 0},
        {"shared, sinks", 4, 2, 32, 32, 4, 32, ALL, 0, 0, true, 0},
        {"shared, more rows than codes are read for", 12, 2, 32, 32, 3, 64, ALL, 0, 0, false, 5},
        {"shared, no copies", 2, 1, 64, 32, 4, 32, 0, 0, 0, true, 0},
    };
    static const paged_case window = {"window", 4, 2, 32, 32, 3, 32, ALL, 400, 0, false, 0};

    (void)state;
    for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++)
        assert_true(decode_behind_prompt(&shared[i]) > 500);
    assert_int_equal(decode_behind_prompt(&window), 0);
}

/* A step with drafts that are all rejected, and one without: later outputs have the same bits. */
static void test_drafts_leave_nothing(void **state)
{
    static const paged_case c = {"drafts", 4, 2, 32, 32, 4, 32, 2, 0, 5, false, 0};
    static float outs[2][200][4 * 32];

    (void)state;
    for (uint32_t way = 0; way < 2; way++) {
        static engine e;
        setup(&e, &c, 9);
        add_to_batch(&e, 0, 40);
        run_batch(&e, NULL);
        for (uint32_t n = 0; n < 200; n++) {
            e.random.state = n;
            e.n_seqs = 0;
            add_to_batch(&e, 0, way == 0 ? 1 : 6);
            e.random.state = n + 1000;
            run_batch(&e, NULL);
            memcpy(outs[way][n], e.out, sizeof(outs[way][n]));
            for (uint32_t p = e.seqs[0].len - (way == 0 ? 0 : 5); p < e.seqs[0].len; p++)
                if (p % c.block_tokens == 0)
                    e.users[e.seqs[0].table[p / c.block_tokens]]--;
            e.seqs[0].len -= way == 0 ? 0 : 5;
        }
        teardown(&e);
    }
    assert_memory_equal(outs[0], outs[1], sizeof(outs[0]));
}

/* Room for as many sequences as there are: no copy is replaced while it is in reach. */
static void test_enough_copies(void **state)
{
    static const paged_case c = {"enough", 2, 1, 16, 16, 4, 32, SEQS_MAX, 0, 3, false, 0};
    static engine e;
    tqkv_paged_stats stats;

    (void)state;
    setup(&e, &c, 13);
    for (uint32_t n = 0; n < 300; n++) {
        e.n_seqs = 0;
        for (uint32_t s = 0; s < SEQS_MAX; s++) {
            const bool is_chunk = test_random_below(&e.random, 10) == 0;
            if (e.seqs[s].len + NEW_MAX > LEN_MAX)
                end_sequence(&e, s);
            add_to_batch(&e, s, 1 + test_random_below(&e.random, is_chunk ? NEW_MAX : 4));
        }
        run_batch(&e, NULL);
        take_back(&e);
    }
    tqkv_paged_get_stats(e.paged, &stats);
    assert_true(stats.n_young > 1000);
    assert_int_equal(stats.n_missing, 0);
    teardown(&e);
}

/* Copies for one sequence, and four that want them: older tiers serve, nothing breaks. */
static void test_too_few_copies(void **state)
{
    static const paged_case c = {"few", 4, 2, 32, 32, 4, 32, 1, 0, 0, false, 0};
    static engine e;
    tqkv_paged_stats stats;
    uint32_t n_lost = 0;

    (void)state;
    setup(&e, &c, 10);
    for (uint32_t n = 0; n < 40; n++) {
        step(&e);
        run_batch(&e, NULL);
        for (uint32_t s = 0; s < SEQS_MAX; s++) {
            const sequence *seq = &e.seqs[s];
            const uint32_t now = tqkv_paged_lost(e.paged, seq->table, seq->len);
            assert_true(now >= lost_copies(&e, seq, seq->len) && now <= LEN_MAX / BLOCK);
            n_lost += now - lost_copies(&e, seq, seq->len);
        }
        for (uint32_t i = 0; i < (uint32_t)e.query_start[e.n_seqs] * c.n_heads * c.v_dim; i++)
            assert_true(isfinite(e.out[i]));
    }
    tqkv_paged_get_stats(e.paged, &stats);
    assert_true(stats.n_young > 0 && stats.n_missing > 0 && n_lost > 0);
    teardown(&e);
}

static void test_bad_config(void **state)
{
    static const paged_case c = {"bad", 4, 2, 32, 32, 2, 32, 1, 0, 0, false, 0};
    static engine e;
    tqkv_paged *paged;

    (void)state;
    setup(&e, &c, 11);
    tqkv_paged_config config = make_config(&e);
#define NO_OBJECT(change, status)                                     \
    do {                                                              \
        config = make_config(&e);                                     \
        change;                                                       \
        assert_int_equal(tqkv_paged_create(&config, &paged), status); \
        assert_null(paged);                                           \
    } while (0)
    NO_OBJECT(config.struct_bytes = 1, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.plan = NULL, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.layer = 1, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.block_tokens = 0, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.block_tokens = 24, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.n_blocks = 0, TQKV_ERR_INVALID_ARG);
    NO_OBJECT(config.n_blocks = 1u << 31, TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_paged_create(NULL, &paged), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_paged_bytes(NULL), 0);
    assert_int_equal(tqkv_paged_create(&config, NULL), TQKV_ERR_INVALID_ARG);

    tqkv_paged_destroy(NULL);
    teardown(&e);
}

static void test_bad_batch(void **state)
{
    static const paged_case c = {"bad", 4, 2, 32, 32, 2, 32, 1, 0, 0, false, 0};
    static engine e;

    (void)state;
    setup(&e, &c, 11);
    add_to_batch(&e, 0, 40);
    const tqkv_paged_batch good = make_batch(&e);
    const tqkv_attend_args good_args = make_args(&e);
    tqkv_paged_batch batch;
    tqkv_attend_args args;
#define NOT_WRITTEN(change)                                                              \
    do {                                                                                 \
        batch = good;                                                                    \
        change;                                                                          \
        assert_int_equal(tqkv_paged_write(e.paged, &batch, NULL), TQKV_ERR_INVALID_ARG); \
        assert_int_equal(tqkv_paged_attend(e.paged, &batch, &good_args, NULL),           \
                         TQKV_ERR_INVALID_ARG);                                          \
    } while (0)
    NOT_WRITTEN(batch.struct_bytes = 0);
    NOT_WRITTEN(batch.blocks = NULL);
    NOT_WRITTEN(batch.block_stride_bytes = 15);
    NOT_WRITTEN(batch.query_start = NULL);
    NOT_WRITTEN(batch.seq_lens = NULL);
    NOT_WRITTEN(batch.block_table = NULL);
    NOT_WRITTEN(batch.k = NULL);
    e.seq_lens[0] = 39;
    NOT_WRITTEN((void)batch);
    e.seq_lens[0] = 40;
    e.tables[0][1] = (int32_t)e.n_blocks;
    NOT_WRITTEN((void)batch);
    e.tables[0][1] = -1;
    NOT_WRITTEN((void)batch);
    assert_int_equal(tqkv_paged_lost(e.paged, e.tables[0], 40), UINT32_MAX);
    assert_int_equal(tqkv_paged_lost(e.paged, NULL, 1), UINT32_MAX);
    assert_int_equal(tqkv_paged_lost(NULL, e.tables[0], 1), UINT32_MAX);
    assert_int_equal(tqkv_paged_lost(e.paged, NULL, 0), 0);
    e.tables[0][1] = e.seqs[0].table[1];
    assert_int_equal(tqkv_paged_write(e.paged, &good, NULL), TQKV_OK);
    assert_int_equal(tqkv_paged_write(NULL, &good, NULL), TQKV_ERR_INVALID_ARG);
#define NOT_ATTENDED(change)                                                                    \
    do {                                                                                        \
        args = good_args;                                                                       \
        change;                                                                                 \
        assert_int_equal(tqkv_paged_attend(e.paged, &good, &args, NULL), TQKV_ERR_INVALID_ARG); \
    } while (0)
    static const uint16_t mask[1];
    NOT_ATTENDED(args.n_q = 39);
    NOT_ATTENDED(args.q = NULL);
    NOT_ATTENDED(args.out = NULL);
    NOT_ATTENDED(args.scratch = NULL);
    NOT_ATTENDED(args.mask = mask);
    NOT_ATTENDED(args.slopes = e.sinks);
    NOT_ATTENDED(args.scale = NAN);
    NOT_ATTENDED(args.softcap = -1);
    assert_int_equal(tqkv_paged_attend(e.paged, &good, &good_args, NULL), TQKV_OK);
    teardown(&e);
}

static void test_memory_fails(void **state)
{
    static const paged_case c = {"memory", 4, 2, 32, 32, 4, 32, 2, 0, 0, false, 0};
    static engine e;

    (void)state;
    setup(&e, &c, 12);
    for (size_t call = 1;; call++) {
        test_memory memory = {.fail_call = call};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_paged_config config = make_config(&e);
        tqkv_paged *paged;
        config.mem = &mem;
        const tqkv_status status = tqkv_paged_create(&config, &paged);
        if (status == TQKV_OK) {
            assert_true(memory.largest <= tqkv_paged_bytes(&config));
            e.n_seqs = 0;
            add_to_batch(&e, 0, 3);
            const tqkv_paged_batch batch = make_batch(&e);
            memory.fail_call = memory.n_calls + 1;
            assert_int_equal(tqkv_paged_write(paged, &batch, NULL), TQKV_ERR_NO_MEMORY);
            tqkv_paged_destroy(paged);
            assert_int_equal(memory.n_live, 0);
            break;
        }
        assert_int_equal(status, TQKV_ERR_NO_MEMORY);
        assert_null(paged);
        assert_int_equal(memory.n_live, 0);
    }
    teardown(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine),         cmocka_unit_test(test_shared_prefix),
        cmocka_unit_test(test_drafts_leave_nothing),
        cmocka_unit_test(test_too_few_copies), cmocka_unit_test(test_enough_copies),
        cmocka_unit_test(test_bad_config),     cmocka_unit_test(test_bad_batch),
        cmocka_unit_test(test_memory_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
