/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels of src/cuda: stored bytes against the CPU codec, attention against float64 on decoded
 * rows, unpacked rows against the CPU decoder. Outputs are poisoned first.
 *
 *     test_cuda [--seed N] [--short]      --short: one case of each template, for memory checkers
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <cuda_runtime_api.h>

#include "cuda_case.h"
#include "store_case.h"

#define MATRIX_ROUNDING 0x1p-12 /* of decode, whose matrices are f16 */
#define ERROR_MAX 2e-3

static uint64_t seed = 20261125;
static bool is_short;

/* ---- store ---- */

/*
 * With two KV heads and 132 multiprocessors a block has one row up to 33 tokens, eight up to 1320,
 * then a tile. It has two tiers or three of 12, 33, 100, 511 or 4500 tokens, otherwise one. Plans at random have dense matrices, those without calibration Walsh-Hadamard ones.
 */
static void test_store(void **state)
{
    static const uint32_t dims[] = {64, 128, 256}, few[] = {1, 9, 70, 1400};
    static const uint32_t counts[] = {33, 63, 64, 65, 100, 511, 512, 513, 1320, 1400};
    const uint32_t *more = is_short ? few : counts, n_more = is_short ? 4 : 10;
    uint32_t n_checks = 0;

    (void)state;
    test_random random = {seed};
    for (int i = 0; i < 3; i++) {
        layer l = make_layer(&random, dims[i], 4, 2, (uint32_t)i);
        for (uint32_t n = 1; n <= 17 && !is_short; n++, n_checks++)
            check_store(&random, &l, n % N_TIERS, n, (tqkv_cuda_type)(n_checks / 2 % 3),
                        (cell_order)(n_checks % N_ORDERS));
        for (uint32_t k = 0; k < n_more * (is_short ? 1u : 3u); k++, n_checks++)
            check_store(&random, &l, n_checks % N_TIERS, more[k % n_more], (tqkv_cuda_type)(k % 3),
                        (cell_order)(k / 3 % N_ORDERS));
        if (!is_short)
            check_store(&random, &l, 0, 4500, TQKV_CUDA_BF16, IN_ORDER);
        free_layer(&l);
        l = make_layer_of(&random, dims[i], 4, 2, (uint32_t)i, 1);
        for (uint32_t k = 0; k < n_more; k++)
            check_store(&random, &l, 0, more[k], (tqkv_cuda_type)(k % 3), (cell_order)(k % 3));
        free_layer(&l);
    }
}

/* ---- decode ---- */

/* Checks rows of one sequence and KV head. Returns the largest relative error. */
static double check_head(const layer *l, const sequences *s, uint32_t seq, uint32_t g,
                         uint32_t q_len, const float *q, const float *out, const float *lse,
                         double scale)
{
    const uint32_t group = l->n_heads / l->n_kv_heads;
    float *rows[2];
    double worst = 0;

    decode_rows(l, s, seq, g, rows);
    for (uint32_t i = 0; i < q_len; i++) {
        for (uint32_t h = g * group; h < (g + 1) * group; h++) {
            const size_t at = (size_t)(seq * q_len + i) * l->n_heads + h;
            const int64_t seen = (int64_t)s->lengths[seq] - q_len + i + 1;
            const double error = row_error(l, rows, seen > 0 ? (uint32_t)seen : 0, q + at * l->dim,
                                           scale, MATRIX_ROUNDING, out + at * l->dim, lse[at]);
            worst = !(error <= worst) ? error : worst;
        }
    }
    free(rows[0]);
    free(rows[1]);
    return worst;
}

static void check_decode(test_random *random, const layer *l, const sequences *s, uint32_t q_len,
                         tqkv_cuda_type type, double tolerance)
{
    const size_t n = (size_t)s->n * q_len * l->n_heads;
    const double scale = 1.0 / sqrt((double)l->dim);
    float *q = random_rows(random, n, l->dim, 1.5f), *lse = malloc(n * 4);
    void *typed = as_type(q, n * l->dim, type), *got = malloc(n * l->dim * 4);
    const size_t bytes = tqkv_cuda_decode_bytes(l->cuda, s->n, q_len, s->max_tokens);
    double worst = 0;

    assert_true(bytes > 0);
    tqkv_cuda_decode_args args = {.pages = s->device,
                                  .q = device_bytes(typed, n * l->dim * type_bytes(type)),
                                  .out = device_bytes(NULL, n * l->dim * 4),
                                  .lse = device_bytes(NULL, n * 4),
                                  .seq_lens = s->device_lengths,
                                  .workspace = device_bytes(NULL, bytes),
                                  .n_seqs = s->n,
                                  .q_len = q_len,
                                  .max_tokens = s->max_tokens,
                                  .scale = (float)scale,
                                  .type = type};
    check(cudaMemset(args.workspace, 0, bytes));
    for (int again = 0; again < 2; again++) { /* the second time as the first left the workspace */
        check(cudaMemset(args.out, POISON, n * l->dim * 4));
        assert_int_equal(tqkv_cuda_decode(l->cuda, l->image, &args, NULL), TQKV_OK);
    }
    to_host(got, args.out, n * l->dim * type_bytes(type));
    to_host(lse, args.lse, n * 4);
    float *out = from_type(got, n * l->dim, type);
    for (uint32_t seq = 0; seq < s->n; seq++) {
        for (uint32_t g = 0; g < l->n_kv_heads; g++) {
            const double error = check_head(l, s, seq, g, q_len, q, out, lse, scale);
            worst = !(error <= worst) ? error : worst;
        }
    }
    printf("decode dim %u heads %u/%u q_len %u sequences %u max %u pages %u type %d: error %.2e\n",
           l->dim, l->n_heads, l->n_kv_heads, q_len, s->n, s->max_tokens, s->page_tokens, (int)type,
           worst);
    assert_true(worst <= tolerance);
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

static void test_decode(void **state)
{
    static const struct decode_case {
        uint32_t dim, n_heads, n_kv_heads, style, page_tokens, q_len, tiers;
        tqkv_cuda_type type;
    } cases[] = {
        {128, 8, 2, TQKV_ROPE_HALVES, 64, 1, 1, TQKV_CUDA_F32},
        {128, 16, 2, TQKV_ROPE_PAIRS, 16, 1, 1, TQKV_CUDA_F32},
        {64, 14, 2, TQKV_ROPE_HALVES, 32, 1, 1, TQKV_CUDA_F16},
        {256, 4, 2, TQKV_ROPE_HALVES, 128, 1, 1, TQKV_CUDA_F32},
        {256, 16, 2, TQKV_ROPE_NONE, 64, 3, 0, TQKV_CUDA_BF16},
        {64, 2, 2, TQKV_ROPE_PAIRS, 64, 8, 1, TQKV_CUDA_F32},
        {128, 16, 1, TQKV_ROPE_HALVES, 64, 2, 0, TQKV_CUDA_F32},
        {64, 1, 1, TQKV_ROPE_NONE, 192, 2, 1, TQKV_CUDA_F32},
    };
    static const int32_t lengths[] = {0,   1,   2,   5,   15,  16,  17,  31,  63,   64,  65,
                                      127, 129, 255, 256, 257, 320, 511, 700, 1023, 1025};
    static const int32_t few[] = {0, 17, 300};

    (void)state;
    test_random random = {seed};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct decode_case *c = &cases[i];
        layer l = make_layer(&random, c->dim, c->n_heads, c->n_kv_heads, c->style);
        sequences s = make_sequences(&random, &l, is_short ? few : lengths,
                                     is_short ? 3 : sizeof(lengths) / sizeof(lengths[0]),
                                     c->page_tokens, c->tiers != 0);
        check_decode(&random, &l, &s, c->q_len, c->type,
                     c->type == TQKV_CUDA_BF16 ? 5e-3 : ERROR_MAX);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* As on devices with less shared memory. */
static void test_small_memory(void **state)
{
    static const int32_t lengths[] = {0, 17, 300, 1025};
    static const uint32_t dims[] = {64, 128, 256}, groups[] = {4, 8};
    static const int limits[] = {SHARED_BYTES_80, SHARED_BYTES_86};
    test_random random = {seed + 4};

    (void)state;
    for (uint32_t i = 0; i < 12; i++) {
        layer l = make_layer(&random, dims[i % 3], 2 * groups[i / 3 % 2], 2, i % 2);
        sequences s = make_sequences(&random, &l, lengths, 4, 64, true);
        limit_shared_memory(limits[i / 6]);
        check_decode(&random, &l, &s, 1, TQKV_CUDA_F32, ERROR_MAX);
        limit_shared_memory(0);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* Few sequences, whose splits are clusters of 2 to 16 blocks, some of them without tokens. */
static void test_clusters(void **state)
{
    static const int32_t lengths[][2] = {{600, 0}, {1100, 40}, {2100, 1090}, {3900, 1700}};
    static const uint32_t dims[] = {64, 128, 256}, groups[] = {3, 8};
    (void)state;
    test_random random = {seed + 2};

    if (is_short)
        skip();
    for (uint32_t i = 0; i < 12; i++) {
        const uint32_t group = groups[i / 3 % 2], n = i % 4 == 3 ? 1 : 2;
        layer l = make_layer(&random, dims[i % 3], group, 1, i % 2);
        sequences s = make_sequences(&random, &l, lengths[i % 4], n, 64, i / 6 == 0);
        check_decode(&random, &l, &s, 1, TQKV_CUDA_F32, ERROR_MAX);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* Every width on its own, as layouts are drawn at random above. */
static void test_long(void **state)
{
    (void)state;
    test_random random = {seed + 1};
    const int32_t lengths[] = {131072, 20000};
    if (is_short)
        skip();
    layer l = make_layer(&random, 64, 4, 1, TQKV_ROPE_HALVES);
    sequences s = make_sequences(&random, &l, lengths, 2, 64, true);
    check_decode(&random, &l, &s, 1, TQKV_CUDA_F32, ERROR_MAX);
    free_sequences(&s);
    free_layer(&l);
}

/* ---- decode beside the store before it ---- */

enum { N_STEPS = 8, N_NEW = 16 }; /* N_NEW: most tokens of a sequence that each step stores again */

typedef struct steps {
    const layer *l;
    tqkv_cuda_store_args store[N_STEPS]; /* other rows each time, in the same cells */
    tqkv_cuda_decode_args decode[N_STEPS];
    size_t out_bytes;
    void *slots[N_TIERS], *positions;
} steps;

/* The last tokens of each sequence in their tiers. Returns how many. */
static uint32_t place_new(const sequences *s, int64_t *slots[N_TIERS], int32_t *positions)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < s->n; i++) {
        const uint32_t length = (uint32_t)s->lengths[i], first = length > N_NEW ? length - N_NEW : 0;
        for (uint32_t t = first; t < length; t++, n++) {
            const int64_t page = s->table[i * s->table_stride + t / s->page_tokens];
            for (uint32_t tier = 0; tier < N_TIERS; tier++)
                slots[tier][n] = s->tiers[i * s->tiers_stride + t / 64] == tier
                                     ? page * s->page_tokens + t % s->page_tokens
                                     : -1;
            positions[n] = (int32_t)t;
        }
    }
    return n;
}

static steps make_steps(test_random *random, const layer *l, const sequences *s)
{
    const size_t n_out = (size_t)s->n * l->n_heads * l->dim, row = (size_t)l->n_kv_heads * l->dim,
                 bytes = tqkv_cuda_decode_bytes(l->cuda, s->n, 1, s->max_tokens);
    int64_t *slots[N_TIERS];
    int32_t *positions = malloc((size_t)s->n * N_NEW * sizeof(*positions));
    steps out = {.l = l, .out_bytes = n_out * sizeof(float)};
    void *workspace = device_bytes(NULL, bytes);

    check(cudaMemset(workspace, 0, bytes));
    for (uint32_t tier = 0; tier < N_TIERS; tier++)
        slots[tier] = malloc((size_t)s->n * N_NEW * sizeof(**slots));
    const uint32_t n = place_new(s, slots, positions);
    out.positions = device_bytes(positions, n * sizeof(*positions));
    for (uint32_t tier = 0; tier < N_TIERS; tier++)
        out.slots[tier] = device_bytes(slots[tier], n * sizeof(**slots));
    for (uint32_t i = 0; i < N_STEPS; i++) {
        float *rows = random_rows(random, n * 2, (uint32_t)row, 1.0f), *q = random_rows(random, n_out, 1, 1.5f);
        const float *kv = device_bytes(rows, 2 * n * row * sizeof(float));
        out.store[i] = (tqkv_cuda_store_args){.k = kv, .v = kv + n * row, .k_token_stride = row,
                                              .v_token_stride = row, .positions = out.positions,
                                              .n_tokens = n, .page_tokens = s->page_tokens,
                                              .type = TQKV_CUDA_F32};
        for (uint32_t tier = 0; tier < N_TIERS; tier++) {
            out.store[i].slots[tier] = out.slots[tier];
            out.store[i].pool[tier] = s->device.pool[tier];
        }
        out.decode[i] = (tqkv_cuda_decode_args){.pages = s->device, .q = device_bytes(q, out.out_bytes),
                                                .out = device_bytes(NULL, out.out_bytes),
                                                .seq_lens = s->device_lengths, .workspace = workspace,
                                                .n_seqs = s->n, .q_len = 1, .max_tokens = s->max_tokens,
                                                .scale = 0.1f, .type = TQKV_CUDA_F32};
        free(rows);
        free(q);
    }
    for (uint32_t tier = 0; tier < N_TIERS; tier++)
        free(slots[tier]);
    free(positions);
    return out;
}

static void free_steps(steps *s)
{
    check(cudaFree(s->decode[0].workspace));
    check(cudaFree(s->positions));
    for (uint32_t tier = 0; tier < N_TIERS; tier++)
        check(cudaFree(s->slots[tier]));
    for (uint32_t i = 0; i < N_STEPS; i++) {
        check(cudaFree((void *)(uintptr_t)s->store[i].k));
        check(cudaFree((void *)(uintptr_t)s->decode[i].q));
        check(cudaFree(s->decode[i].out));
    }
}

/* All steps, each decode beside its store, or when it has ended. */
static void run_steps(steps *s, bool beside, cudaStream_t stream)
{
    for (uint32_t i = 0; i < N_STEPS; i++) {
        s->decode[i].after_store = beside;
        assert_int_equal(tqkv_cuda_store(s->l->cuda, s->l->image, &s->store[i], stream), TQKV_OK);
        if (!beside)
            check(cudaStreamSynchronize(stream));
        assert_int_equal(tqkv_cuda_decode(s->l->cuda, s->l->image, &s->decode[i], stream), TQKV_OK);
        if (!beside)
            check(cudaStreamSynchronize(stream));
    }
}

/* Outputs of all steps, which are poisoned then; to be freed. */
static uint8_t *take_outputs(const steps *s)
{
    uint8_t *out = malloc(N_STEPS * s->out_bytes);

    assert_non_null(out);
    check(cudaDeviceSynchronize());
    for (uint32_t i = 0; i < N_STEPS; i++) {
        to_host(out + i * s->out_bytes, s->decode[i].out, s->out_bytes);
        check(cudaMemset(s->decode[i].out, POISON, s->out_bytes));
    }
    check(cudaDeviceSynchronize());
    return out;
}

static void check_after_store(test_random *random, const layer *l, const sequences *s)
{
    const int n_times = is_short ? 1 : 5;
    steps all = make_steps(random, l, s);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t run;

    check(cudaStreamCreate(&stream));
    run_steps(&all, false, stream);
    uint8_t *want = take_outputs(&all);
    assert_memory_not_equal(want, want + all.out_bytes, all.out_bytes);
    for (int again = 0; again < n_times; again++) {
        run_steps(&all, true, stream);
        uint8_t *got = take_outputs(&all);
        assert_memory_equal(got, want, N_STEPS * all.out_bytes);
        free(got);
    }
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run_steps(&all, true, stream);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&run, graph, 0));
    for (int again = 0; again < n_times; again++) {
        check(cudaGraphLaunch(run, stream));
        check(cudaGraphLaunch(run, stream));
        uint8_t *got = take_outputs(&all);
        assert_memory_equal(got, want, N_STEPS * all.out_bytes);
        free(got);
    }
    check(cudaGraphExecDestroy(run));
    check(cudaGraphDestroy(graph));
    check(cudaStreamDestroy(stream));
    free(want);
    free_steps(&all);
}

/* A cluster (not if short), splits that meet in the workspace, and one split; stores of one row a block and of eight. */
static void test_after_store(void **state)
{
    static const int32_t lengths[] = {700, 3, 1500, 90, 2100, 64, 1023, 1024, 1025, 17, 300, 2000};
    static const struct {
        uint32_t dim, n_heads, n, page_tokens;
    } cases[] = {{128, 8, 1, 64}, {128, 8, 12, 64}, {64, 14, 12, 16}, {256, 4, 3, 64}, {128, 16, 7, 32}};

    (void)state;
    test_random random = {seed + 3};
    for (size_t i = is_short; i < (is_short ? 2 : sizeof(cases) / sizeof(cases[0])); i++) {
        layer l = make_layer(&random, cases[i].dim, cases[i].n_heads, 2, TQKV_ROPE_HALVES);
        sequences s = make_sequences(&random, &l, lengths, cases[i].n, cases[i].page_tokens, true);
        check_after_store(&random, &l, &s);
        free_sequences(&s);
        free_layer(&l);
    }
}

/* ---- unpack, merge ---- */

static void test_unpack(void **state)
{
    static const uint32_t dims[] = {64, 128, 256};
    const int32_t length = 300;

    (void)state;
    test_random random = {seed};
    for (uint32_t i = 0; i < 3; i++) {
        layer l = make_layer(&random, dims[i], 4, 2, i);
        sequences s = make_sequences(&random, &l, &length, 1, 64, true);
        const uint32_t first = 64, n = 211;
        const size_t count = (size_t)n * l.n_kv_heads * l.dim;
        tqkv_cuda_unpack_args args = {.pages = s.device,
                                      .k = device_bytes(NULL, count * 4),
                                      .v = device_bytes(NULL, count * 4),
                                      .first = first,
                                      .n_tokens = n,
                                      .type = TQKV_CUDA_F32};
        float *got[2] = {malloc(count * 4), malloc(count * 4)}, want[256];
        assert_int_equal(tqkv_cuda_unpack(l.cuda, l.image, &args, NULL), TQKV_OK);
        to_host(got[0], args.k, count * 4);
        to_host(got[1], args.v, count * 4);
        for (uint32_t t = 0; t < n; t++) {
            for (uint32_t g = 0; g < l.n_kv_heads; g++) {
                for (int side = 0; side < 2; side++) {
                    const float *row = got[side] + ((size_t)t * l.n_kv_heads + g) * l.dim;
                    double error = 0, norm = 0;
                    get_row(&l, s.tiers[(first + t) / 64], g, (tqkv_side)side, (int32_t)(first + t),
                            block_of(&l, &s, 0, first + t), (first + t) % 16, want);
                    for (uint32_t d = 0; d < l.dim; d++) {
                        error +=
                            ((double)row[d] - (double)want[d]) * ((double)row[d] - (double)want[d]);
                        norm += (double)want[d] * (double)want[d];
                    }
                    if (!(error <= norm * 1e-10))
                        fprintf(stderr, "unpack: dim %u token %u head %u side %d: error %g\n",
                                l.dim, first + t, g, side, sqrt(error / norm));
                    assert_true(error <= norm * 1e-10);
                }
            }
        }
        check(cudaFree(args.k));
        check(cudaFree(args.v));
        free(got[0]);
        free(got[1]);
        free_sequences(&s);
        free_layer(&l);
    }
}

static void test_merge(void **state)
{
    enum { ROWS = 5, DIM = 64 };
    test_random random = {seed};
    float *a = random_rows(&random, ROWS, DIM, 1), *b = random_rows(&random, ROWS, DIM, 1),
          got[ROWS * DIM], lse[ROWS];
    const float lse_a[ROWS] = {0, 3, -INFINITY, -INFINITY, 100},
                lse_b[ROWS] = {0, -2, 1, -INFINITY, 101};
    float *device[4] = {device_bytes(a, sizeof(got)), device_bytes(lse_a, sizeof(lse)),
                        device_bytes(b, sizeof(got)), device_bytes(lse_b, sizeof(lse))};

    (void)state;
    assert_int_equal(
        tqkv_cuda_merge(device[0], device[1], device[2], device[3], ROWS, DIM, TQKV_CUDA_F32, NULL),
        TQKV_OK);
    to_host(got, device[0], sizeof(got));
    to_host(lse, device[1], sizeof(lse));
    for (uint32_t r = 0; r < ROWS; r++) {
        const double pa = exp((double)lse_a[r]), pb = exp((double)lse_b[r]), sum = pa + pb;
        for (uint32_t d = 0; d < DIM; d++) {
            const double want =
                sum > 0 ? ((double)a[r * DIM + d] * pa + (double)b[r * DIM + d] * pb) / sum : 0;
            assert_true(fabs((double)got[r * DIM + d] - want) <= 1e-5 * (1 + fabs(want)));
        }
        if (sum > 0)
            assert_true(fabs((double)lse[r] - log(sum)) <= 1e-4);
        else
            assert_true(isinf(lse[r]) && lse[r] < 0);
    }
    for (int i = 0; i < 4; i++)
        check(cudaFree(device[i]));
    free(a);
    free(b);
}

/* ---- arguments, without a device ---- */

static void test_arguments(void **state)
{
    tqkv_plan_layer shape = test_shape(4, 2, 128, 128), latent = test_shape(4, 1, 128, 128);
    tqkv_plan *plan;
    tqkv_cuda_layer *made;
    size_t n;

    (void)state;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), TQKV_ERR_UNSUPPORTED);
    assert_int_equal(tqkv_cuda_layer_create(plan, 1, NULL, NULL, &made), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_layer_create(NULL, 0, NULL, NULL, &made), TQKV_ERR_INVALID_ARG);
    tqkv_plan_destroy(plan);
    latent.is_latent = 1;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &latent, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), TQKV_ERR_UNSUPPORTED);
    tqkv_plan_destroy(plan);
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(plan, 0, NULL, NULL, &made), TQKV_OK);
    assert_true(tqkv_cuda_layer_image(made, &n) && n > 0);
    assert_int_equal(tqkv_cuda_page_bytes(made, 0, 64), 4 * 2 * 2 * 16 * (1 + 128));
    assert_int_equal(tqkv_cuda_page_bytes(made, 1, 64), 0);
    assert_int_equal(tqkv_cuda_page_bytes(made, 0, 17), 0);
    assert_true(tqkv_cuda_decode_bytes(made, 2, 1, 4096) > tqkv_cuda_decode_bytes(made, 1, 1, 4096));
    assert_int_equal(tqkv_cuda_decode_bytes(made, 0, 1, 4096), 0);
    assert_int_equal(tqkv_cuda_decode(made, NULL, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_store(made, NULL, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_unpack(made, NULL, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_cuda_merge(NULL, NULL, NULL, NULL, 1, 64, TQKV_CUDA_F32, NULL),
                     TQKV_ERR_INVALID_ARG);
    tqkv_cuda_layer_destroy(made);
    tqkv_cuda_layer_destroy(NULL);
    tqkv_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest host_tests[] = {cmocka_unit_test(test_arguments)};
    const struct CMUnitTest device_tests[] = {
        cmocka_unit_test(test_store), cmocka_unit_test(test_unpack), cmocka_unit_test(test_merge),
        cmocka_unit_test(test_decode), cmocka_unit_test(test_small_memory), cmocka_unit_test(test_clusters),
        cmocka_unit_test(test_after_store), cmocka_unit_test(test_long)};

    is_short = read_arguments(argc, argv, &seed);
    const int failed = cmocka_run_group_tests(host_tests, NULL, NULL);
    if (failed || !has_device())
        return failed ? failed : SKIPPED;
    return cmocka_run_group_tests(device_tests, NULL, NULL);
}
