/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Chunks of prompts over stored contexts (src/cuda/prefill.cu), against float64 on what the CPU decodes. Outputs are
 * poisoned first, and what belongs to no sequence has to stay so.
 *
 *     test_prefill [--seed N] [--short]      --short: small contexts, for memory checkers
 */
#include "cuda_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define GAP 3 /* rows before the first sequence, and behind the last */
#define SEQUENCES_MAX 32
#define ROUNDING 0x1p-11 /* queries are f16 twice: turned, and multiplied with the matrix */

static uint64_t seed = 20261129;
static bool is_short;

typedef struct chunks {
    int32_t starts[SEQUENCES_MAX + 1];
    uint32_t n_rows, max_q; /* n_rows: with both gaps */
} chunks;

static chunks make_chunks(const uint32_t *lengths, uint32_t n)
{
    chunks c = {.starts = {GAP}};

    for (uint32_t i = 0; i < n; i++) {
        c.starts[i + 1] = c.starts[i] + (int32_t)lengths[i];
        c.max_q = lengths[i] > c.max_q ? lengths[i] : c.max_q;
    }
    c.n_rows = (uint32_t)c.starts[n] + GAP;
    return c;
}

/* Every row of short contexts, some of long ones. Returns the largest error. */
static double check_sequence(const layer *l, const sequences *s, const chunks *c, uint32_t seq, bool is_causal,
                             const float *q, double scale, const float *out, const float *lse)
{
    const uint32_t n = (uint32_t)(c->starts[seq + 1] - c->starts[seq]), group = l->n_heads / l->n_kv_heads,
                   step = s->lengths[seq] > 100 ? 5 : 1;
    double worst = 0;

    for (uint32_t g = 0; g < l->n_kv_heads; g++) {
        float *rows[2];
        decode_rows(l, s, seq, g, rows);
        for (uint32_t row = 0; row < n * group; row += row + step < n * group ? step : 1) {
            const uint32_t i = row / group;
            const size_t at = (size_t)(c->starts[seq] + (int32_t)i) * l->n_heads + g * group + row % group;
            const int64_t seen = s->lengths[seq] - (is_causal ? (int64_t)n - i - 1 : 0);
            const double error = row_error(l, rows, seen > 0 ? (uint32_t)seen : 0, q + at * l->dim, scale,
                                           ROUNDING, out + at * l->dim, lse[at]);
            worst = !(error <= worst) ? error : worst;
        }
        free(rows[0]);
        free(rows[1]);
    }
    return worst;
}

static bool is_poison(const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (((const uint8_t *)p)[i] != POISON)
            return false;
    return true;
}

/* Rows of no sequence. */
static void check_gaps(const layer *l, const chunks *c, const uint8_t *out, size_t value_bytes, const float *lse)
{
    const size_t row = (size_t)l->n_heads * l->dim * value_bytes, last = c->n_rows - GAP;

    assert_true(is_poison(out, GAP * row) && is_poison(out + last * row, GAP * row));
    assert_true(is_poison(lse, GAP * l->n_heads * 4) && is_poison(lse + last * l->n_heads, GAP * l->n_heads * 4));
}

static void check_prefill(test_random *random, const layer *l, const sequences *s, const chunks *c,
                          tqkv_cuda_type type, bool is_causal, bool splits)
{
    const size_t n = (size_t)c->n_rows * l->n_heads, value = type_bytes(type);
    const double scale = 1.0 / sqrt((double)l->dim);
    float *q = random_rows(random, n, l->dim, 1.5f), *lse = malloc(n * 4);
    void *typed = as_type(q, n * l->dim, type), *got = malloc(n * l->dim * 4);
    const uint32_t n_tokens = c->n_rows;
    const size_t bytes =
        splits ? tqkv_cuda_prefill_bytes(l->cuda, s->n, n_tokens, c->max_q, s->max_tokens) : 0;
    double worst = 0;
    tqkv_cuda_prefill_args args = {.pages = s->device,
                                   .q = device_bytes(typed, n * l->dim * value),
                                   .out = device_bytes(NULL, n * l->dim * value),
                                   .lse = device_bytes(NULL, n * 4),
                                   .q_starts = device_bytes(c->starts, (s->n + 1) * 4),
                                   .context_lens = s->device_lengths,
                                   .workspace = device_bytes(NULL, bytes),
                                   .workspace_bytes = bytes,
                                   .n_seqs = s->n,
                                   .n_tokens = n_tokens,
                                   .max_q = c->max_q,
                                   .max_context = s->max_tokens,
                                   .is_causal = is_causal,
                                   .scale = (float)scale,
                                   .type = type};

    assert_int_equal(tqkv_cuda_prefill(l->cuda, l->image, &args, NULL), TQKV_OK);
    to_host(got, args.out, n * l->dim * value);
    to_host(lse, args.lse, n * 4);
    check_gaps(l, c, got, value, lse);
    float *out = from_type(got, n * l->dim, type);
    for (uint32_t seq = 0; seq < s->n; seq++) {
        const double error = check_sequence(l, s, c, seq, is_causal, q, scale, out, lse);
        worst = !(error <= worst) ? error : worst;
    }
    printf("prefill dim %u heads %u/%u sequences %u rows %u max %u pages %u type %d causal %d workspace %zu: error %.2e\n",
           l->dim, l->n_heads, l->n_kv_heads, s->n, c->n_rows, s->max_tokens, s->page_tokens, (int)type,
           (int)is_causal, bytes, worst);
    assert_true(worst <= (type == TQKV_CUDA_BF16 ? 5e-3 : 1e-3));
    check(cudaFree((void *)(uintptr_t)args.q));
    check(cudaFree((void *)(uintptr_t)args.q_starts));
    check(cudaFree(args.out));
    check(cudaFree(args.lse));
    check(cudaFree(args.workspace));
    free(q);
    free(lse);
    free(typed);
    free(got);
    free(out);
}

static void test_chunks(void **state)
{
    static const struct prefill_case {
        uint32_t dim, n_heads, n_kv_heads, style, page_tokens, tiers;
        tqkv_cuda_type type;
    } cases[] = {
        {128, 8, 2, TQKV_ROPE_HALVES, 64, 1, TQKV_CUDA_F16},  {128, 16, 1, TQKV_ROPE_PAIRS, 16, 1, TQKV_CUDA_F32},
        {64, 14, 2, TQKV_ROPE_HALVES, 32, 1, TQKV_CUDA_F16},  {256, 4, 2, TQKV_ROPE_HALVES, 128, 1, TQKV_CUDA_F32},
        {256, 8, 1, TQKV_ROPE_NONE, 64, 0, TQKV_CUDA_BF16},   {64, 1, 1, TQKV_ROPE_PAIRS, 64, 1, TQKV_CUDA_F32},
        {128, 3, 1, TQKV_ROPE_NONE, 192, 0, TQKV_CUDA_BF16},
    };
    static const int32_t contexts[] = {0,  1,  15,  16,  17,  63,   64,   65,   130,
                                       40, 0,  700, 320, 127, 1023, 1024, 1025, 2050};
    static const uint32_t lengths[] = {5, 17, 64, 130, 1, 0, 5, 17, 64, 130, 1, 33, 0, 5, 17, 64, 1, 40};
    const uint32_t n = is_short ? 9 : sizeof(contexts) / sizeof(contexts[0]);
    const chunks c = make_chunks(lengths, n);
    test_random random = {seed};

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct prefill_case *k = &cases[i];
        layer l = make_layer(&random, k->dim, k->n_heads, k->n_kv_heads, k->style);
        sequences s = make_sequences(&random, &l, contexts, n, k->page_tokens, k->tiers != 0);
        check_prefill(&random, &l, &s, &c, k->type, false, false);
        check_prefill(&random, &l, &s, &c, k->type, true, true);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* Few rows behind long contexts, in parts. */
static void test_parts(void **state)
{
    static const int32_t contexts[] = {5000, 70};
    static const uint32_t lengths[] = {7, 20}, dims[] = {64, 128, 256};
    const chunks c = make_chunks(lengths, 2);
    test_random random = {seed + 1};

    (void)state;
    if (is_short)
        skip();
    for (uint32_t i = 0; i < 3; i++) {
        layer l = make_layer(&random, dims[i], 6, 1, i);
        sequences s = make_sequences(&random, &l, contexts, 2, 64, i != 2);
        assert_true(tqkv_cuda_prefill_bytes(l.cuda, 2, c.n_rows, c.max_q, s.max_tokens) > 0);
        check_prefill(&random, &l, &s, &c, TQKV_CUDA_F16, i == 1, true);
        check_prefill(&random, &l, &s, &c, TQKV_CUDA_F16, false, false);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* As on devices with less shared memory: fewer stages, no matrix or low parts of rows there. */
static void test_small_memory(void **state)
{
    static const int32_t contexts[] = {700, 1025, 64};
    static const uint32_t lengths[] = {17, 130, 64}, dims[] = {64, 128, 256};
    static const int limits[] = {SHARED_BYTES_80, SHARED_BYTES_86};
    const chunks c = make_chunks(lengths, 3);
    test_random random = {seed + 3};

    (void)state;
    for (uint32_t i = 0; i < (is_short ? 3u : 6u); i++) {
        layer l = make_layer(&random, dims[i % 3], 6, 1, i % 3);
        sequences s = make_sequences(&random, &l, contexts, 3, 64, true);
        limit_shared_memory(limits[is_short || i >= 3]);
        check_prefill(&random, &l, &s, &c, TQKV_CUDA_F16, true, false);
        limit_shared_memory(0);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* A mean of K that dwarfs the rest, as models with a bias have it, and queries of very different sizes. */
static void test_sizes(void **state)
{
    test_random random = {seed + 2};
    const int32_t context = is_short ? 100 : 1500;
    const uint32_t length = 40;
    const chunks c = make_chunks(&length, 1);
    layer l = make_layer(&random, 128, 2, 1, TQKV_ROPE_HALVES);
    sequences s = make_sequences(&random, &l, &context, 1, 64, true);
    const size_t n = (size_t)c.n_rows * 2;
    float *q = random_rows(&random, n, 128, 1.0f), *out = malloc(n * 128 * 4), *lse = malloc(n * 4);
    double worst = 0;

    (void)state;
    for (size_t i = 0; i < n * 128; i++)
        q[i] *= powf(10.0f, (float)(i / 128 % 7) - 5.0f);
    tqkv_cuda_prefill_args args = {.pages = s.device,
                                   .q = device_bytes(q, n * 128 * 4),
                                   .out = device_bytes(NULL, n * 128 * 4),
                                   .lse = device_bytes(NULL, n * 4),
                                   .q_starts = device_bytes(c.starts, 8),
                                   .context_lens = s.device_lengths,
                                   .n_seqs = 1,
                                   .n_tokens = length,
                                   .max_q = length,
                                   .max_context = s.max_tokens,
                                   .scale = 0.1f,
                                   .type = TQKV_CUDA_F32};
    assert_int_equal(tqkv_cuda_prefill(l.cuda, l.image, &args, NULL), TQKV_OK);
    to_host(out, args.out, n * 128 * 4);
    to_host(lse, args.lse, n * 4);
    worst = check_sequence(&l, &s, &c, 0, false, q, (double)0.1f, out, lse);
    printf("prefill queries of 1e-5 to 10: error %.2e\n", worst);
    assert_true(worst <= 2e-3);
    check(cudaFree((void *)(uintptr_t)args.q));
    check(cudaFree((void *)(uintptr_t)args.q_starts));
    check(cudaFree(args.out));
    check(cudaFree(args.lse));
    free(q);
    free(out);
    free(lse);
    free_sequences(&s);
    free_layer(&l);
}

/* ---- arguments, without a device ---- */

static void test_arguments(void **state)
{
    static int memory[4]; /* never read: calls are refused, or have nothing to do */
    tqkv_plan_layer shape = test_shape(4, 2, 128, 128);
    tqkv_plan *plan;
    tqkv_cuda_layer *made;

    (void)state;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), TQKV_OK);
    const tqkv_cuda_prefill_args good = {
        .pages = {.pool = {memory}, .block_table = memory, .page_tokens = 64, .table_stride = 4},
        .q = memory,
        .out = memory,
        .q_starts = memory,
        .context_lens = memory,
        .n_seqs = 1,
        .max_context = 100,
        .scale = 1,
        .type = TQKV_CUDA_F16};
    tqkv_cuda_prefill_args bad[11];
    for (size_t i = 0; i < 11; i++)
        bad[i] = good;
    bad[0].q_starts = NULL;
    bad[1].context_lens = NULL;
    bad[2].pages.block_table = NULL;
    bad[3].pages.pool[0] = NULL;
    bad[4].pages.page_tokens = 48;
    bad[5].n_seqs = 0;
    bad[6].n_seqs = 65536;
    bad[7].max_q = 1; /* of no tokens */
    bad[8].max_context = UINT32_MAX;
    bad[9].type = (tqkv_cuda_type)3;
    bad[10].workspace_bytes = 256;
    for (size_t i = 0; i < 11; i++)
        assert_int_equal(tqkv_cuda_prefill(made, memory, &bad[i], NULL), TQKV_ERR_INVALID_ARG);
    bad[0] = bad[1] = good;
    bad[0].n_tokens = bad[0].max_q = bad[1].n_tokens = bad[1].max_q = 1;
    bad[0].q = NULL;
    bad[1].out = NULL;
    for (size_t i = 0; i < 2; i++)
        assert_int_equal(tqkv_cuda_prefill(made, memory, &bad[i], NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_prefill(made, memory, &good, NULL), TQKV_OK); /* no tokens */
    assert_int_equal(tqkv_cuda_prefill(NULL, memory, &good, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_prefill(made, NULL, &good, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_prefill(made, memory, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_prefill_bytes(NULL, 1, 1, 1, 64), 0);
    assert_int_equal(tqkv_cuda_prefill_bytes(made, 0, 1, 1, 64), 0);
    tqkv_cuda_layer_destroy(made);
    tqkv_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest host_tests[] = {cmocka_unit_test(test_arguments)};
    const struct CMUnitTest device_tests[] = {cmocka_unit_test(test_chunks), cmocka_unit_test(test_parts),
                                              cmocka_unit_test(test_sizes), cmocka_unit_test(test_small_memory)};

    is_short = read_arguments(argc, argv, &seed);
    const int failed = cmocka_run_group_tests(host_tests, NULL, NULL);
    if (failed || !has_device())
        return failed ? failed : SKIPPED;
    return cmocka_run_group_tests(device_tests, NULL, NULL);
}
