/* SPDX-License-Identifier: Apache-2.0 */
/* A layer whose blocks belong to an engine, under the small engine of test_paged_engine.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "test_memory.h"
#include "test_paged_engine.h"
#include "test_store_make.h"

/* What a scheduler might do in one step. */
static void step(test_engine *e)
{
    e->n_seqs = 0;
    for (uint32_t s = 0; s < TEST_SEQS_MAX; s++) {
        test_sequence *seq = &e->seqs[s];
        const uint32_t dice = test_random_below(&e->random, 20);
        if (dice == 0 || seq->len + TEST_NEW_MAX > TEST_LEN_MAX)
            test_end_sequence(e, s);
        if (seq->len == 0)
            test_begin_sequence(e, s);
        if (dice == 1)
            continue; /* not scheduled */
        if (seq->len == 0 || dice < 6)
            test_add_to_batch(e, s, 1 + test_random_below(&e->random, TEST_NEW_MAX - 1));
        else
            test_add_to_batch(e, s, 1 + test_random_below(&e->random, e->c->n_drafts + 1));
    }
}

/* Drafts that were not accepted: the same positions are written again in a later step. */
static void take_back(test_engine *e)
{
    for (uint32_t b = 0; b < e->n_seqs; b++) {
        const uint32_t n = (uint32_t)(e->query_start[b + 1] - e->query_start[b]);
        test_sequence *seq = &e->seqs[e->of[b]];
        if (n < 2 || n > 1 + e->c->n_drafts)
            continue;
        const uint32_t left = seq->len - test_random_below(&e->random, n);
        for (uint32_t p = left; p < seq->len; p++)
            if (p % e->c->block_tokens == 0)
                e->users[seq->table[p / e->c->block_tokens]]--;
        seq->len = left;
    }
}

static const test_paged_case cases[] = {
    {"f16", 4, 2, 32, 48, 0, 16, 4, 0, 0, false, 0, false},
    {"one tier", 2, 1, 32, 32, 1, 32, 4, 0, 2, true, 0, false},
    {"four tiers", 4, 2, 32, 32, 4, 32, TEST_ALL, 0, 3, false, 0, false},
    {"four tiers, large blocks", 6, 2, 64, 32, 4, 128, TEST_ALL, 0, 5, true, 5, false},
    {"no copies", 4, 2, 32, 32, 4, 16, 0, 0, 1, false, 0, false},
    {"window", 4, 2, 32, 32, 3, 32, TEST_ALL, 70, 2, false, 0, false},
    {"window of two tiers", 4, 2, 32, 32, 4, 32, TEST_ALL, 53, 2, true, 0, false},
    {"window in the raw rows", 2, 2, 16, 16, 2, 16, TEST_ALL, 9, 0, true, 3, false},
    {"latents, f16", 4, 1, 16, 64, 0, 16, 4, 0, 0, false, 0, true},
    {"latents, four tiers", 5, 1, 32, 48, 4, 32, TEST_ALL, 0, 3, true, 0, true},
    {"latents, large blocks", 20, 1, 16, 32, 3, 128, TEST_ALL, 0, 5, false, 5, true},
    {"latents, no copies", 3, 1, 64, 32, 4, 16, 0, 0, 1, false, 0, true},
    {"latents, window", 2, 1, 16, 16, 3, 32, TEST_ALL, 70, 2, false, 0, true},
};

static void test_random_steps(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        static test_engine e;
        test_paged_setup(&e, &cases[i], 300 + i);
        const tqkv_parallel ways[] = {test_threads(3), test_backwards(3)};
        uint32_t n_lost = 0;
        for (uint32_t n = 0; n < 60; n++) {
            step(&e);
            test_run_batch(&e, n % 3 < 2 ? &ways[n % 3] : NULL);
            for (uint32_t b = 0; b < e.n_seqs; b++)
                for (int32_t t = e.query_start[b]; t < e.query_start[b + 1]; t += 1 + t / 8)
                    test_check_row(&e, b, (uint32_t)t, test_random_below(&e.random, e.c->n_heads));
            take_back(&e);
            for (uint32_t s = 0; s < TEST_SEQS_MAX && e.c->window == 0; s++)
                n_lost += test_check_lost(&e, &e.seqs[s]);
        }
        tqkv_paged_stats stats;
        tqkv_paged_get_stats(e.paged, &stats);
        assert_true(stats.n_written > 1000 && stats.n_bad_rows == 0);
        assert_int_equal(stats.n_young > 0, tqkv_paged_old_tier(e.plan, 0) > 0 && e.c->n_sequences > 0);
        /* Tier 0 reaches 32 tokens: in larger blocks not all have copies. */
        assert_int_equal(n_lost > 0, e.c->n_sequences == TEST_ALL && e.c->block_tokens > 32);
        test_paged_teardown(&e);
    }
}

/*
 * One long prompt, and sequences behind all of it, most of it and little of it, that decode
 * together; one of them pauses now and then. Returns reads that were shared.
 */
static uint64_t decode_behind_prompt(const test_paged_case *c)
{
    static test_engine e;
    const tqkv_parallel ways[] = {test_threads(3), test_backwards(3)};
    const uint32_t n_blocks[] = {0, 320, 256, 64};
    tqkv_paged_stats stats;

    test_paged_setup(&e, c, 17);
    for (uint32_t at = 0; at < 320; at += 64) {
        e.n_seqs = 0;
        test_add_to_batch(&e, 0, 64);
        test_run_batch(&e, NULL);
    }
    for (uint32_t s = 1; s < TEST_SEQS_MAX; s++)
        test_share_blocks(&e, s, &e.seqs[0], n_blocks[s] / c->block_tokens);
    for (uint32_t n = 0; n < 70; n++) {
        e.n_seqs = 0;
        for (uint32_t s = 0; s < TEST_SEQS_MAX; s++)
            if (s != n % 5)
                test_add_to_batch(&e, s, 1);
        test_run_batch(&e, n % 3 < 2 ? &ways[n % 3] : NULL);
        for (uint32_t b = 0; b < e.n_seqs; b++)
            test_check_row(&e, b, b, test_random_below(&e.random, c->n_heads));
    }
    tqkv_paged_get_stats(e.paged, &stats);
    test_paged_teardown(&e);
    return stats.n_shared;
}

static void test_shared_prefix(void **state)
{
    static const test_paged_case shared[] = {
        {"shared, f16", 4, 2, 32, 48, 0, 16, 4, 0, 0, false, 0, false},
        {"shared, sinks", 4, 2, 32, 32, 4, 32, TEST_ALL, 0, 0, true, 0, false},
        {"shared, unpacked", 12, 2, 32, 32, 3, 64, TEST_ALL, 0, 0, false, 5, false},
        {"shared, no copies", 2, 1, 64, 32, 4, 32, 0, 0, 0, true, 0, false},
    };
    static const test_paged_case window = {"window", 4, 2, 32, 32, 3, 32, TEST_ALL, 400, 0, false,
                                           0, false};
    static const test_paged_case latents = {"not shared, latents", 4, 1, 32, 32, 4, 32, TEST_ALL, 0,
                                            0, true, 0, true};

    (void)state;
    for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++)
        assert_true(decode_behind_prompt(&shared[i]) > 500);
    assert_int_equal(decode_behind_prompt(&window), 0);
    assert_int_equal(decode_behind_prompt(&latents), 0);
}

/* DeepSeek's shape: a prompt in chunks, a second sequence behind it, drafts; by codes, and exactly. */
static void test_deepseek_latents(void **state)
{
    static const test_paged_case c[] = {
        {"DeepSeek, f16", 16, 1, 64, 512, 0, 16, 4, 0, 3, false, 0, true},
        {"DeepSeek, tiers", 16, 1, 64, 512, 4, 16, TEST_ALL, 0, 3, false, 0, true},
    };
    static test_engine e;
    static const uint32_t n_new[][2] = {{96, 0}, {96, 0}, {40, 7}, {1, 96}, {1, 1}, {4, 4}, {4, 1}};

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        test_paged_setup(&e, &c[i], 23);
        for (size_t n = 0; n < sizeof(n_new) / sizeof(n_new[0]); n++) {
            e.n_seqs = 0;
            for (uint32_t s = 0; s < 2; s++)
                if (n_new[n][s] > 0)
                    test_add_to_batch(&e, s, n_new[n][s]);
            test_run_batch(&e, NULL);
            for (uint32_t b = 0; b < e.n_seqs; b++)
                for (uint32_t t = 0; t < 2; t++) {
                    const uint32_t token = (uint32_t)e.query_start[b + t] - t;
                    test_check_row(&e, b, token, test_random_below(&e.random, 16));
                    if (c[i].n_tiers == 0)
                        test_check_exact(&e, b, token, test_random_below(&e.random, 16));
                }
            take_back(&e);
        }
        test_paged_teardown(&e);
    }
}

/* A step with drafts that are all rejected, and one without: later outputs have the same bits. */
static void drafts_leave_nothing(const test_paged_case *c)
{
    static float outs[2][200][4 * 32];

    for (uint32_t way = 0; way < 2; way++) {
        static test_engine e;
        test_paged_setup(&e, c, 9);
        test_add_to_batch(&e, 0, 40);
        test_run_batch(&e, NULL);
        for (uint32_t n = 0; n < 200; n++) {
            e.random.state = n;
            e.n_seqs = 0;
            test_add_to_batch(&e, 0, way == 0 ? 1 : 6);
            e.random.state = n + 1000;
            test_run_batch(&e, NULL);
            memcpy(outs[way][n], e.out, sizeof(outs[way][n]));
            for (uint32_t p = e.seqs[0].len - (way == 0 ? 0 : 5); p < e.seqs[0].len; p++)
                if (p % c->block_tokens == 0)
                    e.users[e.seqs[0].table[p / c->block_tokens]]--;
            e.seqs[0].len -= way == 0 ? 0 : 5;
        }
        test_paged_teardown(&e);
    }
    assert_memory_equal(outs[0], outs[1], sizeof(outs[0]));
}

static void test_drafts_leave_nothing(void **state)
{
    static const test_paged_case plain = {"drafts", 4, 2, 32, 32, 4, 32, 2, 0, 5, false, 0, false};
    static const test_paged_case latents = {"drafts, latents", 4, 1, 16, 32, 4, 32, 2, 0, 5, false, 0,
                                            true};

    (void)state;
    drafts_leave_nothing(&plain);
    drafts_leave_nothing(&latents);
}

/* Room for as many sequences as there are: no copy is replaced while it is in reach. */
static void test_enough_copies(void **state)
{
    static const test_paged_case c = {"enough", 2, 1, 16, 16, 4, 32, TEST_SEQS_MAX, 0, 3, false, 0, false};
    static test_engine e;
    tqkv_paged_stats stats;

    (void)state;
    test_paged_setup(&e, &c, 13);
    for (uint32_t n = 0; n < 300; n++) {
        e.n_seqs = 0;
        for (uint32_t s = 0; s < TEST_SEQS_MAX; s++) {
            const bool is_chunk = test_random_below(&e.random, 10) == 0;
            if (e.seqs[s].len + TEST_NEW_MAX > TEST_LEN_MAX)
                test_end_sequence(&e, s);
            test_add_to_batch(&e, s, 1 + test_random_below(&e.random, is_chunk ? TEST_NEW_MAX : 4));
        }
        test_run_batch(&e, NULL);
        take_back(&e);
    }
    tqkv_paged_get_stats(e.paged, &stats);
    assert_true(stats.n_young > 1000);
    assert_int_equal(stats.n_missing, 0);
    test_paged_teardown(&e);
}

/* Copies for one sequence, and four that want them: older tiers serve, nothing breaks. */
static void test_too_few_copies(void **state)
{
    static const test_paged_case c = {"few", 4, 2, 32, 32, 4, 32, 1, 0, 0, false, 0, false};
    static test_engine e;
    tqkv_paged_stats stats;
    uint32_t n_lost = 0;

    (void)state;
    test_paged_setup(&e, &c, 10);
    for (uint32_t n = 0; n < 40; n++) {
        step(&e);
        test_run_batch(&e, NULL);
        for (uint32_t s = 0; s < TEST_SEQS_MAX; s++) {
            const test_sequence *seq = &e.seqs[s];
            const uint32_t now = tqkv_paged_lost(e.paged, seq->table, seq->len);
            assert_true(now >= test_lost_copies(&e, seq, seq->len) &&
                        now <= TEST_LEN_MAX / TEST_BLOCK);
            n_lost += now - test_lost_copies(&e, seq, seq->len);
        }
        for (uint32_t i = 0; i < (uint32_t)e.query_start[e.n_seqs] * c.n_heads * c.v_dim; i++)
            assert_true(isfinite(e.out[i]));
    }
    tqkv_paged_get_stats(e.paged, &stats);
    assert_true(stats.n_young > 0 && stats.n_missing > 0 && n_lost > 0);
    test_paged_teardown(&e);
}

/*
 * A prompt, and more prompts than there are copies for: where its end is asked to be kept, a later
 * sequence finds it; the ends of as many prompts as there are sequences are kept, no more.
 */
static void test_kept_prefix(void **state)
{
    static const test_paged_case c = {"kept", 4, 2, 32, 32, 2, 32, 2, 0, 0, false, 0, false};
    static test_engine e;

    (void)state;
    for (uint32_t n_kept = 0; n_kept <= 3; n_kept++) {
        test_paged_setup(&e, &c, 19);
        test_add_to_batch(&e, 0, 64);
        test_run_batch(&e, NULL);
        const test_sequence first = e.seqs[0];
        assert_int_equal(tqkv_paged_lost(e.paged, first.table, first.len), 0);
        for (uint32_t n = 0; n < 30; n++) {
            if (n < n_kept)
                assert_int_equal(tqkv_paged_keep(e.paged, e.seqs[n == 0 ? 0 : 1].table, 64),
                                 TQKV_OK);
            test_end_sequence(&e, 1);
            e.n_seqs = 0;
            test_add_to_batch(&e, 1, TEST_NEW_MAX);
            test_run_batch(&e, NULL);
        }
        const uint32_t n_lost = tqkv_paged_lost(e.paged, first.table, first.len);
        assert_int_equal(n_lost > 0, n_kept == 0 || n_kept == 3);
        test_paged_teardown(&e);
    }
}

static void test_bad_config(void **state)
{
    static const test_paged_case c = {"bad", 4, 2, 32, 32, 2, 32, 1, 0, 0, false, 0, false};
    static test_engine e;
    tqkv_paged *paged;

    (void)state;
    test_paged_setup(&e, &c, 11);
    tqkv_paged_config config = test_paged_config(&e);
#define NO_OBJECT(change, status)                                     \
    do {                                                              \
        config = test_paged_config(&e);                                     \
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
    test_paged_teardown(&e);
}

static void test_bad_batch(void **state)
{
    static const test_paged_case c = {"bad", 4, 2, 32, 32, 2, 32, 1, 0, 0, false, 0, false};
    static test_engine e;

    (void)state;
    test_paged_setup(&e, &c, 11);
    test_add_to_batch(&e, 0, 40);
    const tqkv_paged_batch good = test_paged_batch(&e);
    const tqkv_attend_args good_args = test_paged_args(&e);
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
    assert_int_equal(tqkv_paged_keep(e.paged, e.tables[0], 40), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_paged_keep(e.paged, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_paged_keep(NULL, e.tables[0], 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_paged_keep(e.paged, NULL, 0), TQKV_OK);
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
    NOT_ATTENDED(args.q_latent = args.q); /* the layer is not latent */
    assert_int_equal(tqkv_paged_attend(e.paged, &good, &good_args, NULL), TQKV_OK);
    test_paged_teardown(&e);
}

static void test_latents_want_their_query(void **state)
{
    static const test_paged_case c = {"latent", 4, 1, 32, 32, 2, 32, 1, 0, 0, false, 0, true};
    static test_engine e;

    (void)state;
    test_paged_setup(&e, &c, 11);
    test_add_to_batch(&e, 0, 40);
    test_run_batch(&e, NULL);
    const tqkv_paged_batch batch = test_paged_batch(&e);
    tqkv_attend_args args = test_paged_args(&e);
    args.q_latent = NULL;
    assert_int_equal(tqkv_paged_attend(e.paged, &batch, &args, NULL), TQKV_ERR_INVALID_ARG);
    test_paged_teardown(&e);
}

static void test_memory_fails(void **state)
{
    static const test_paged_case c = {"memory", 4, 2, 32, 32, 4, 32, 2, 0, 0, false, 0, false};
    static test_engine e;

    (void)state;
    test_paged_setup(&e, &c, 12);
    for (size_t call = 1;; call++) {
        test_memory memory = {.fail_call = call};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_paged_config config = test_paged_config(&e);
        tqkv_paged *paged;
        config.mem = &mem;
        const tqkv_status status = tqkv_paged_create(&config, &paged);
        if (status == TQKV_OK) {
            assert_true(memory.largest <= tqkv_paged_bytes(&config));
            e.n_seqs = 0;
            test_add_to_batch(&e, 0, 3);
            const tqkv_paged_batch batch = test_paged_batch(&e);
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
    test_paged_teardown(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_steps),         cmocka_unit_test(test_shared_prefix),
        cmocka_unit_test(test_drafts_leave_nothing), cmocka_unit_test(test_kept_prefix),
        cmocka_unit_test(test_too_few_copies), cmocka_unit_test(test_enough_copies),
        cmocka_unit_test(test_bad_config),     cmocka_unit_test(test_bad_batch),
        cmocka_unit_test(test_memory_fails),   cmocka_unit_test(test_deepseek_latents),
        cmocka_unit_test(test_latents_want_their_query),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
