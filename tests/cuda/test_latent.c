/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Latent layers on a device: stored bytes against the CPU codec, decode and gather against float64 on what the CPU
 * decodes. Outputs are poisoned first.
 *
 *     test_latent [--seed N] [--short]      --short: small contexts, for memory checkers
 */
#include "store_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define V_DIM 512u
#define K_DIM 64u
#define Q_DIM (V_DIM + K_DIM)

static uint64_t seed = 20261201;
static bool is_short;

/* Rows of one sequence: K, and latents in coded space: x times the transform. For the caller to free. */
typedef struct context {
    float *k;
    double *w;
    uint32_t n;
} context;

static context make_context(const layer *l, const sequences *s, uint32_t seq)
{
    const float *transform = l->codec->heads[TQKV_SIDE_V][0].plan->transform;
    float *rows[2];
    context c = {.n = (uint32_t)s->lengths[seq]};

    decode_rows(l, s, seq, 0, rows);
    c.k = rows[TQKV_SIDE_K];
    c.w = calloc((size_t)c.n * V_DIM + 1, sizeof(double));
    assert_non_null(c.w);
    for (uint32_t t = 0; t < c.n; t++)
        for (uint32_t i = 0; i < V_DIM; i++)
            for (uint32_t j = 0; j < V_DIM; j++)
                c.w[(size_t)t * V_DIM + j] +=
                    (double)rows[TQKV_SIDE_V][(size_t)t * V_DIM + i] * (double)transform[i * V_DIM + j];
    free(rows[TQKV_SIDE_V]);
    return c;
}

static void free_context(context *c)
{
    free(c->k);
    free(c->w);
}

/* The relative error of an output, and the error of the log of its sum. */
typedef struct errors {
    double out, lse;
} errors;

static void keep_worst(errors *worst, errors one)
{
    worst->out = !(one.out <= worst->out) ? one.out : worst->out;
    worst->lse = !(one.lse <= worst->lse) ? one.lse : worst->lse;
}

/* Of one row that sees n tokens. */
static errors row_error_of(const context *c, uint32_t n, const float *q, double scale, const float *out, float lse)
{
    double *s = malloc((n + 1) * sizeof(*s)), want[V_DIM] = {0}, top = -INFINITY, sum = 0, error = 0, norm = 0;

    assert_non_null(s);
    for (uint32_t t = 0; t < n; t++) {
        s[t] = 0;
        for (uint32_t d = 0; d < V_DIM; d++)
            s[t] += scale * (double)q[d] * c->w[(size_t)t * V_DIM + d];
        for (uint32_t d = 0; d < K_DIM; d++)
            s[t] += scale * (double)q[V_DIM + d] * (double)c->k[(size_t)t * K_DIM + d];
        top = s[t] > top ? s[t] : top;
    }
    for (uint32_t t = 0; t < n; t++) {
        const double p = exp(s[t] - top);
        sum += p;
        for (uint32_t d = 0; d < V_DIM; d++)
            want[d] += p * c->w[(size_t)t * V_DIM + d];
    }
    free(s);
    for (uint32_t d = 0; d < V_DIM; d++) {
        const double difference = (double)out[d] - (n > 0 ? want[d] / sum : 0.0);
        error += difference * difference;
        norm += n > 0 ? want[d] / sum * (want[d] / sum) : 0.0;
    }
    if (n == 0) {
        assert_true(error == 0 && isinf(lse) && lse < 0);
        return (errors){0};
    }
    return (errors){norm > 0 ? sqrt(error / norm) : sqrt(error), fabs((double)lse - (top + log(sum)))};
}

static void check_decode(test_random *random, const layer *l, const sequences *s, uint32_t q_len, tqkv_cuda_type type)
{
    const size_t n = (size_t)s->n * q_len * l->n_heads, value = type_bytes(type);
    const double scale = 1.0 / sqrt(192.0);
    const size_t bytes = tqkv_cuda_decode_bytes(l->cuda, s->n, q_len, s->max_tokens);
    float *q = random_rows(random, n, Q_DIM, 0.7f), *lse = malloc(n * 4);
    void *got = malloc(n * V_DIM * 4);
    errors worst = {0};

    assert_true(bytes > 0 && lse && got);
    for (size_t i = 0; i < n * Q_DIM; i++) /* sizes from row to row */
        q[i] *= powf(4.0f, (float)(i / Q_DIM % 4) - 3.0f);
    void *typed = as_type(q, n * Q_DIM, type);
    tqkv_cuda_decode_args args = {.pages = s->device,
                                  .q = device_bytes(typed, n * Q_DIM * value),
                                  .out = device_bytes(NULL, n * V_DIM * value),
                                  .lse = device_bytes(NULL, n * 4),
                                  .seq_lens = s->device_lengths,
                                  .workspace = device_bytes(NULL, bytes),
                                  .n_seqs = s->n,
                                  .q_len = q_len,
                                  .max_tokens = s->max_tokens,
                                  .scale = (float)scale,
                                  .type = type};
    assert_int_equal(tqkv_cuda_decode(l->cuda, l->image, &args, NULL), TQKV_OK);
    to_host(got, args.out, n * V_DIM * value);
    to_host(lse, args.lse, n * 4);
    float *out = from_type(got, n * V_DIM, type);
    for (uint32_t seq = 0; seq < s->n; seq++) {
        context c = make_context(l, s, seq);
        for (uint32_t row = 0; row < q_len * l->n_heads; row += c.n > 200 ? 3 : 1) {
            const size_t at = (size_t)seq * q_len * l->n_heads + row;
            const int64_t seen = (int64_t)c.n - q_len + row / l->n_heads + 1;
            keep_worst(&worst, row_error_of(&c, seen > 0 ? (uint32_t)seen : 0, q + at * Q_DIM, scale, out + at * V_DIM,
                                            lse[at]));
        }
        free_context(&c);
    }
    printf("latent decode heads %u q_len %u sequences %u max %u pages %u type %d workspace %zu: error %.2e, lse %.2e\n",
           l->n_heads, q_len, s->n, s->max_tokens, s->page_tokens, (int)type, bytes, worst.out, worst.lse);
    assert_true(worst.out <= (type == TQKV_CUDA_BF16 ? 4e-3 : 1.5e-3) && worst.lse <= 2e-3);
    check(cudaFree((void *)(uintptr_t)args.q));
    check(cudaFree(args.out));
    check(cudaFree(args.lse));
    check(cudaFree(args.workspace));
    free(q);
    free(lse);
    free(typed);
    free(got);
    free(out);
}

/* Every stored token from the 16th on of sequences that have them, in rows with a gap behind each. */
static void check_gather(const layer *l, const sequences *s, tqkv_cuda_type type)
{
    const size_t stride = Q_DIM + 8, value = type_bytes(type);
    int32_t *starts = calloc(s->n + 1, 4), *firsts = calloc(s->n, 4);
    double worst = 0;

    assert_true(starts && firsts);
    for (uint32_t i = 0; i < s->n; i++) {
        firsts[i] = i % 2 ? 16 : 0;
        starts[i + 1] = starts[i] + (s->lengths[i] > firsts[i] ? s->lengths[i] - firsts[i] : 0);
    }
    const size_t n = (size_t)starts[s->n], bytes = (n + 1) * stride * value;
    uint8_t *got = malloc(bytes);
    assert_non_null(got);
    tqkv_cuda_gather_args args = {.pages = s->device,
                                  .out = device_bytes(NULL, bytes),
                                  .out_stride = stride,
                                  .starts = device_bytes(starts, (s->n + 1) * 4),
                                  .firsts = device_bytes(firsts, s->n * 4),
                                  .n_seqs = s->n,
                                  .n_tokens = (uint32_t)n + 40,
                                  .type = type};
    assert_int_equal(tqkv_cuda_gather(l->cuda, l->image, &args, NULL), TQKV_OK);
    to_host(got, args.out, bytes);
    float *out = from_type(got, (n + 1) * stride, type);
    for (uint32_t seq = 0; seq < s->n; seq++) {
        context c = make_context(l, s, seq);
        for (uint32_t t = (uint32_t)firsts[seq]; t < c.n; t++) {
            const float *row = out + ((size_t)starts[seq] + t - (uint32_t)firsts[seq]) * stride;
            double error = 0, norm = 1e-20;
            for (uint32_t d = 0; d < Q_DIM; d++) {
                const double want = d < V_DIM ? c.w[(size_t)t * V_DIM + d] : (double)c.k[(size_t)t * K_DIM + d - V_DIM];
                error += ((double)row[d] - want) * ((double)row[d] - want);
                norm += want * want;
            }
            worst = !(sqrt(error / norm) <= worst) ? sqrt(error / norm) : worst;
        }
        free_context(&c);
    }
    for (size_t i = 0; i < (n + 1) * stride * value; i++) /* gaps, and the row behind the last */
        if (i / value % stride >= Q_DIM || i / value / stride >= n)
            assert_int_equal(got[i], POISON);
    printf("latent gather rows %zu type %d: error %.2e\n", n, (int)type, worst);
    assert_true(worst <= (type == TQKV_CUDA_BF16 ? 4e-3 : type == TQKV_CUDA_F16 ? 5e-4 : 2e-5));
    check(cudaFree(args.out));
    check(cudaFree((void *)(uintptr_t)args.starts));
    check(cudaFree((void *)(uintptr_t)args.firsts));
    free(starts);
    free(firsts);
    free(got);
    free(out);
}

static void test_latent_store(void **state)
{
    static const uint32_t counts[] = {1, 7, 8, 9, 64, 131, 140, 600};
    test_random random = {seed};
    uint32_t n_checks = 0;

    (void)state;
    for (uint32_t n_tiers = 1; n_tiers <= N_TIERS; n_tiers += N_TIERS - 1) {
        layer l = make_latent_layer(&random, 16, TQKV_ROPE_PAIRS, n_tiers);
        for (uint32_t i = 0; i < (is_short ? 4u : 8u); i++)
            for (uint32_t k = 0; k < (is_short ? 1u : 3u); k++, n_checks++)
                check_store(&random, &l, n_checks % n_tiers, counts[i], (tqkv_cuda_type)(n_checks % 3),
                            (cell_order)(k % N_ORDERS));
        free_layer(&l);
    }
}

static void test_latent_decode(void **state)
{
    static const struct latent_case {
        uint32_t n_heads, q_len, style, page_tokens, tiers;
        tqkv_cuda_type type;
    } cases[] = {
        {16, 1, TQKV_ROPE_PAIRS, 64, 1, TQKV_CUDA_F16},   {128, 1, TQKV_ROPE_HALVES, 128, 1, TQKV_CUDA_BF16},
        {3, 1, TQKV_ROPE_HALVES, 16, 1, TQKV_CUDA_F32},   {32, 2, TQKV_ROPE_NONE, 64, 0, TQKV_CUDA_F16},
        {20, 1, TQKV_ROPE_PAIRS, 32, 1, TQKV_CUDA_F32},   {16, 8, TQKV_ROPE_PAIRS, 64, 1, TQKV_CUDA_BF16},
        {64, 1, TQKV_ROPE_PAIRS, 64, 1, TQKV_CUDA_F32},   {128, 1, TQKV_ROPE_PAIRS, 64, 1, TQKV_CUDA_F32},
    };
    static const int32_t lengths[] = {0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 255, 257, 700};
    const uint32_t n = is_short ? 9 : sizeof(lengths) / sizeof(lengths[0]);
    test_random random = {seed + 1};

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct latent_case *k = &cases[i];
        layer l = make_latent_layer(&random, k->n_heads, k->style, N_TIERS);
        sequences s = make_sequences(&random, &l, lengths, n, k->page_tokens, k->tiers != 0);
        check_decode(&random, &l, &s, k->q_len, k->type);
        check_gather(&l, &s, k->type);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* As on devices with less shared memory: tiles of fewer rows, one stage. */
static void test_small_memory(void **state)
{
    static const int32_t lengths[] = {17, 300, 64};
    static const uint32_t heads[] = {16, 32, 128};
    static const int limits[] = {SHARED_BYTES_80, SHARED_BYTES_86};
    test_random random = {seed + 3};

    (void)state;
    for (uint32_t i = 0; i < 6; i++) {
        layer l = make_latent_layer(&random, heads[i % 3], TQKV_ROPE_PAIRS, N_TIERS);
        sequences s = make_sequences(&random, &l, lengths, 3, 64, true);
        limit_shared_memory(limits[i / 3]);
        check_decode(&random, &l, &s, 1, TQKV_CUDA_F16);
        limit_shared_memory(0);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* One sequence: parts, and a merge. */
static void test_latent_parts(void **state)
{
    const int32_t length = 3000;
    test_random random = {seed + 2};

    (void)state;
    if (is_short)
        skip();
    layer l = make_latent_layer(&random, 16, TQKV_ROPE_PAIRS, N_TIERS);
    sequences s = make_sequences(&random, &l, &length, 1, 64, true);
    assert_true(tqkv_cuda_decode_bytes(l.cuda, 1, 1, s.max_tokens) > 16 * 513 * 4);
    check_decode(&random, &l, &s, 1, TQKV_CUDA_F16);
    check_decode(&random, &l, &s, 5, TQKV_CUDA_F32);
    free_sequences(&s);
    free_layer(&l);
}

/* ---- without a device ---- */

static tqkv_cuda_layer *host_layer(uint32_t k_dim, uint32_t v_dim, bool is_latent, tqkv_status wanted)
{
    tqkv_plan_layer shape = test_shape(16, 1, k_dim, v_dim);
    tqkv_plan *plan;
    tqkv_cuda_layer *made;

    shape.is_latent = is_latent;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), wanted);
    tqkv_plan_destroy(plan);
    return made;
}

static void test_latent_arguments(void **state)
{
    static int memory[4]; /* never read: calls are refused, or have nothing to do */
    tqkv_cuda_layer *latent = host_layer(64, 512, true, TQKV_OK), *plain = host_layer(64, 64, false, TQKV_OK);
    const tqkv_cuda_pages pages = {.pool = {memory}, .block_table = memory, .page_tokens = 64, .table_stride = 4};
    const tqkv_cuda_gather_args good = {
        .pages = pages, .out = memory, .out_stride = 576, .starts = memory, .firsts = memory, .n_seqs = 1};
    tqkv_cuda_gather_args bad[7];

    (void)state;
    assert_null(host_layer(128, 512, true, TQKV_ERR_UNSUPPORTED));
    assert_null(host_layer(64, 256, true, TQKV_ERR_UNSUPPORTED));
    for (size_t i = 0; i < 7; i++)
        bad[i] = good;
    bad[0].out = NULL;
    bad[1].starts = NULL;
    bad[2].firsts = NULL;
    bad[3].n_seqs = 0;
    bad[4].out_stride = 575;
    bad[5].type = (tqkv_cuda_type)3;
    bad[6].pages.block_table = NULL;
    for (size_t i = 0; i < 7; i++)
        assert_int_equal(tqkv_cuda_gather(latent, memory, &bad[i], NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_gather(latent, memory, &good, NULL), TQKV_OK); /* no tokens */
    assert_int_equal(tqkv_cuda_gather(plain, memory, &good, NULL), TQKV_ERR_UNSUPPORTED);
    const tqkv_cuda_unpack_args unpack = {.pages = pages, .k = memory, .v = memory};
    assert_int_equal(tqkv_cuda_unpack(latent, memory, &unpack, NULL), TQKV_ERR_UNSUPPORTED);
    const tqkv_cuda_prefill_args prefill = {.pages = pages, .q_starts = memory, .context_lens = memory, .n_seqs = 1};
    assert_int_equal(tqkv_cuda_prefill(latent, memory, &prefill, NULL), TQKV_ERR_UNSUPPORTED);
    assert_null(tqkv_cuda_layer_inverse(plain));
    assert_non_null(tqkv_cuda_layer_inverse(latent));
    assert_int_equal(tqkv_cuda_decode_bytes(latent, 1, 9, 64), 0);
    tqkv_cuda_layer_destroy(latent);
    tqkv_cuda_layer_destroy(plain);
}

/* x[i] = sum_j inverse[j][i] w[j] undoes the transform of the codec. */
static void test_inverse(void **state)
{
    tqkv_plan_layer shape = test_shape(16, 1, 64, 512);
    tqkv_plan *plan;
    tqkv_cuda_layer *made;

    (void)state;
    shape.is_latent = 1;
    assert_int_equal(test_plan_make(NULL, 5, &shape, 1, N_TIERS, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), TQKV_OK);
    const float *inverse = tqkv_cuda_layer_inverse(made), *transform = plan->layers[0].heads[TQKV_SIDE_V][0].transform;
    for (size_t i = 0; i < V_DIM; i += 37) {
        for (size_t k = 0; k < V_DIM; k++) {
            double sum = 0;
            for (size_t j = 0; j < V_DIM; j++)
                sum += (double)transform[i * V_DIM + j] * (double)inverse[j * V_DIM + k];
            assert_true(fabs(sum - (i == k ? 1.0 : 0.0)) < 1e-4);
        }
    }
    tqkv_cuda_layer_destroy(made);
    tqkv_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest host_tests[] = {cmocka_unit_test(test_latent_arguments), cmocka_unit_test(test_inverse)};
    const struct CMUnitTest device_tests[] = {cmocka_unit_test(test_latent_store), cmocka_unit_test(test_latent_decode),
                                              cmocka_unit_test(test_small_memory), cmocka_unit_test(test_latent_parts)};

    is_short = read_arguments(argc, argv, &seed);
    const int failed = cmocka_run_group_tests(host_tests, NULL, NULL);
    if (failed || !has_device())
        return failed ? failed : SKIPPED;
    return cmocka_run_group_tests(device_tests, NULL, NULL);
}
