/* SPDX-License-Identifier: Apache-2.0 */
/* Layers, stored sequences and attention in float64 for tests of kernels (cuda_case.h). */
#include "cuda_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "format/block_rows.h"
#include "test_arrays.h"

bool read_arguments(int argc, char **argv, uint64_t *seed)
{
    bool is_short = false;

    for (int i = 1; i < argc; i++)
        is_short |= !strcmp(argv[i], "--short");
    test_arguments(argc, argv, seed);
    return is_short;
}

bool has_device(void)
{
    int n = 0;

    if (cudaGetDeviceCount(&n) == cudaSuccess && n > 0)
        return true;
    printf("no CUDA device: device tests skipped\n");
    return false;
}

static int shared_bytes;

void limit_shared_memory(int bytes)
{
    shared_bytes = bytes;
}

/* The linker has calls of cudaDeviceGetAttribute come here (tests/CMakeLists.txt). */
cudaError_t __real_cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t __wrap_cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);

cudaError_t __wrap_cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    const cudaError_t error = __real_cudaDeviceGetAttribute(value, attribute, device);
    const int most = attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor  ? shared_bytes
                     : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? shared_bytes - 1024
                                                                            : 0;

    if (shared_bytes > 0 && most > 0 && *value > most)
        *value = most;
    return error;
}

void check(cudaError_t error)
{
    if (error != cudaSuccess)
        fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    assert_int_equal(error, cudaSuccess);
}

void *device_bytes(const void *from, size_t n)
{
    void *p;
    check(cudaMalloc(&p, n + 1));
    if (from)
        check(cudaMemcpy(p, from, n, cudaMemcpyHostToDevice));
    else
        check(cudaMemset(p, POISON, n));
    return p;
}

void to_host(void *to, const void *from, size_t n)
{
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost));
}

/* ---- a layer ---- */

static layer layer_of_shape(test_random *random, tqkv_plan_layer shape, uint32_t style, uint32_t n_tiers)
{
    layer l = {.dim = shape.k_dim,
               .n_heads = shape.n_heads,
               .n_kv_heads = shape.n_kv_heads,
               .dims = {shape.k_dim, shape.v_dim}};
    size_t n;

    shape.rope.style = style;
    if (style == TQKV_ROPE_PAIRS)
        shape.rope.n_rot = shape.k_dim / 2;
    if (style == TQKV_ROPE_NONE)
        shape.rope = (tqkv_rope){.style = TQKV_ROPE_NONE};
    if (n_tiers == 1)
        assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &l.plan), TQKV_OK);
    else
        assert_int_equal(test_plan_make(NULL, test_random_u32(random), &shape, 1, n_tiers, &l.plan),
                         TQKV_OK);
    assert_int_equal(tqkv_codec_create(l.plan, 0, NULL, NULL, &l.codec), TQKV_OK);
    assert_int_equal(tqkv_cuda_layer_create(l.plan, 0, NULL, NULL, &l.cuda), TQKV_OK);
    const void *image = tqkv_cuda_layer_image(l.cuda, &n);
    l.image = device_bytes(image, n);
    return l;
}

/* n_tiers: 1 for the plan of 8 bits without calibration. */
layer make_layer_of(test_random *random, uint32_t dim, uint32_t n_heads, uint32_t n_kv_heads,
                    uint32_t style, uint32_t n_tiers)
{
    return layer_of_shape(random, test_shape(n_heads, n_kv_heads, dim, dim), style, n_tiers);
}

layer make_latent_layer(test_random *random, uint32_t n_heads, uint32_t style, uint32_t n_tiers)
{
    tqkv_plan_layer shape = test_shape(n_heads, 1, 64, 512);

    shape.is_latent = 1;
    return layer_of_shape(random, shape, style, n_tiers);
}

layer make_layer(test_random *random, uint32_t dim, uint32_t n_heads, uint32_t n_kv_heads,
                 uint32_t style)
{
    return make_layer_of(random, dim, n_heads, n_kv_heads, style, N_TIERS);
}

void free_layer(layer *l)
{
    check(cudaFree(l->image));
    tqkv_cuda_layer_destroy(l->cuda);
    tqkv_codec_destroy(l->codec);
    tqkv_plan_destroy(l->plan);
}

/* Where the section of a head and side is in a block, and how long a block is. */
uint32_t section_offset(const layer *l, uint32_t tier, uint32_t g, tqkv_side side)
{
    uint32_t offset = 0;
    for (uint32_t i = 0; i < g; i++)
        for (uint32_t s = 0; s < 2; s++)
            offset += 16 * (1 + tqkvi_codec_layout(l->codec, (tqkv_side)s, i, tier)->row_bytes);
    return offset + (side == TQKV_SIDE_V
                         ? 16 * (1 + tqkvi_codec_layout(l->codec, TQKV_SIDE_K, g, tier)->row_bytes)
                         : 0);
}

uint32_t block_bytes(const layer *l, uint32_t tier)
{
    return section_offset(l, tier, l->n_kv_heads, TQKV_SIDE_K);
}

int32_t base_of(const layer *l, tqkv_side side, int32_t position)
{
    return side == TQKV_SIDE_K ? tqkvi_frame_base(position, l->plan->frame_tokens) : 0;
}

/* One row into a block on the host. */
void put_row(const layer *l, uint32_t tier, uint32_t g, tqkv_side side, int32_t position,
             const float *x, uint8_t *block, uint32_t slot)
{
    uint8_t codes[TQKVI_ROW_BYTES_MAX], scale;
    uint8_t *section = block + section_offset(l, tier, g, side);
    assert_int_equal(tqkv_codec_encode(l->codec, g, side, tier, base_of(l, side, position), x,
                                       l->dims[side], 1, &scale, codes, NULL),
                     TQKV_OK);
    section[slot] = scale;
    tqkvi_block_put_row(tqkvi_codec_layout(l->codec, side, g, tier), side, section + 16, slot,
                        codes);
}

void get_row(const layer *l, uint32_t tier, uint32_t g, tqkv_side side, int32_t position,
             const uint8_t *block, uint32_t slot, float *x)
{
    uint8_t codes[TQKVI_ROW_BYTES_MAX];
    const uint8_t *section = block + section_offset(l, tier, g, side);
    tqkvi_block_get_row(tqkvi_codec_layout(l->codec, side, g, tier), side, section + 16, slot,
                        codes);
    assert_int_equal(tqkv_codec_decode(l->codec, g, side, tier, base_of(l, side, position),
                                       section + slot, codes, 1, x, l->dims[side]),
                     TQKV_OK);
}

/* ---- values of a type ---- */

size_t type_bytes(tqkv_cuda_type type)
{
    return type == TQKV_CUDA_F32 ? 4 : 2;
}

float bf16_to_float(uint16_t v)
{
    const uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

uint16_t float_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    if (isnan(f))
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Rounds x to the type in place and returns the array of that type. */
void *as_type(float *x, size_t n, tqkv_cuda_type type)
{
    uint16_t *halves = malloc(n * 4);
    assert_non_null(halves);
    if (type == TQKV_CUDA_F32) {
        memcpy(halves, x, n * 4);
        return halves;
    }
    for (size_t i = 0; i < n; i++) {
        halves[i] = type == TQKV_CUDA_F16 ? tqkvi_float_to_half(x[i]) : float_to_bf16(x[i]);
        x[i] = type == TQKV_CUDA_F16 ? tqkvi_half_to_float(halves[i]) : bf16_to_float(halves[i]);
    }
    return halves;
}

float *from_type(const void *p, size_t n, tqkv_cuda_type type)
{
    float *x = malloc(n * 4);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = type == TQKV_CUDA_F32   ? ((const float *)p)[i]
               : type == TQKV_CUDA_F16 ? tqkvi_half_to_float(((const uint16_t *)p)[i])
                                       : bf16_to_float(((const uint16_t *)p)[i]);
    return x;
}

float *random_rows(test_random *random, size_t n_rows, uint32_t dim, float size)
{
    float *x = malloc(n_rows * dim * sizeof(float));
    assert_non_null(x);
    for (size_t i = 0; i < n_rows * dim; i++)
        x[i] = size * test_random_normal(random);
    return x;
}

/* ---- sequences in pages ---- */


uint8_t *block_of(const layer *l, const sequences *s, uint32_t seq, uint32_t token)
{
    const uint32_t tier = s->tiers[seq * s->tiers_stride + token / 64];
    const int32_t page = s->table[seq * s->table_stride + token / s->page_tokens];
    return s->pool[tier] + (size_t)page * tqkv_cuda_page_bytes(l->cuda, tier, s->page_tokens) +
           (size_t)(token % s->page_tokens / 16) * block_bytes(l, tier);
}

/* Pages in random order, tiers in runs as ageing makes them; tokens that are not there stay poison. */
sequences make_sequences(test_random *random, const layer *l, const int32_t *lengths,
                         uint32_t n, uint32_t page_tokens, bool tiers)
{
    sequences s = {.n = n, .page_tokens = page_tokens};
    float *x = random_rows(random, 1, l->dims[TQKV_SIDE_V], 1.0f); /* no less than those of K */

    for (uint32_t i = 0; i < n; i++)
        s.max_tokens = (uint32_t)lengths[i] > s.max_tokens ? (uint32_t)lengths[i] : s.max_tokens;
    s.max_tokens += s.max_tokens == 0;
    s.table_stride = s.max_tokens / page_tokens + 2;
    s.tiers_stride = s.max_tokens / 64 + 2;
    s.n_pages = n * s.table_stride;
    s.lengths = malloc(n * 4);
    s.table = malloc(s.n_pages * 4);
    s.tiers = calloc(n, s.tiers_stride);
    assert_true(s.lengths && s.table && s.tiers && x);
    memcpy(s.lengths, lengths, n * 4);
    for (uint32_t i = 0; i < s.n_pages; i++)
        s.table[i] = (int32_t)((i * 7919u + 13u) % s.n_pages);
    for (uint32_t i = 0; s.n_pages % 7919u == 0 && i < s.n_pages; i++)
        s.table[i] = (int32_t)i;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t t = 0; t < s.tiers_stride; t++)
            s.tiers[i * s.tiers_stride + t] = !tiers ? N_TIERS - 1
                                              : t == 0 || 64 * t + 100 > (uint32_t)lengths[i] ? 0
                                              : 64 * t + 300 > (uint32_t)lengths[i]           ? 1
                                                                                              : 2;
    for (uint32_t tier = 0; tier < N_TIERS; tier++) {
        const size_t bytes = s.n_pages * tqkv_cuda_page_bytes(l->cuda, tier, page_tokens);
        s.pool[tier] = malloc(bytes);
        assert_non_null(s.pool[tier]);
        memset(s.pool[tier], POISON, bytes);
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t t = 0; t < (uint32_t)lengths[i]; t++) {
            for (uint32_t g = 0; g < l->n_kv_heads; g++) {
                for (int side = 0; side < 2; side++) {
                    for (uint32_t d = 0; d < l->dims[side]; d++)
                        x[d] = test_random_normal(random) + (d == 3 ? 2.0f : 0.0f);
                    if (test_random_u32(random) % 50 == 0)
                        memset(x, 0, l->dims[side] * sizeof(*x));
                    put_row(l, s.tiers[i * s.tiers_stride + t / 64], g, (tqkv_side)side, (int32_t)t,
                            x, block_of(l, &s, i, t), t % 16);
                }
            }
        }
    }
    s.device = (tqkv_cuda_pages){.block_table = device_bytes(s.table, s.n_pages * 4),
                                 .page_tokens = page_tokens,
                                 .table_stride = s.table_stride,
                                 .tiers_stride = s.tiers_stride};
    if (tiers)
        s.device.tiers = device_bytes(s.tiers, n * s.tiers_stride);
    for (uint32_t tier = 0; tier < N_TIERS; tier++)
        s.device.pool[tier] = device_bytes(
            s.pool[tier], s.n_pages * tqkv_cuda_page_bytes(l->cuda, tier, page_tokens));
    s.device_lengths = device_bytes(s.lengths, n * 4);
    free(x);
    return s;
}

void free_sequences(sequences *s)
{
    for (uint32_t tier = 0; tier < N_TIERS; tier++) {
        check(cudaFree(s->device.pool[tier]));
        free(s->pool[tier]);
    }
    check(cudaFree((void *)(uintptr_t)s->device.block_table));
    check(cudaFree((void *)(uintptr_t)s->device.tiers));
    check(cudaFree(s->device_lengths));
    free(s->lengths);
    free(s->table);
    free(s->tiers);
}

/*
 * float64 attention of one row over tokens [0, n) of a KV head. out: [dim]. terms: the largest sum of a score's terms
 * without their signs. Returns the lse.
 */
static double attend(const layer *l, const float *k, const float *v, uint32_t n, const float *q,
                     double scale, double *out, double *terms)
{
    double top = -INFINITY, sum = 0;
    double *s = malloc((n + 1) * sizeof(*s));

    memset(out, 0, l->dim * sizeof(*out));
    *terms = 0;
    for (uint32_t t = 0; t < n; t++) {
        double size = 0;
        s[t] = 0;
        for (uint32_t d = 0; d < l->dim; d++) {
            const double term = scale * (double)q[d] * (double)k[(size_t)t * l->dim + d];
            s[t] += term;
            size += fabs(term);
        }
        *terms = size > *terms ? size : *terms;
        top = s[t] > top ? s[t] : top;
    }
    for (uint32_t t = 0; t < n; t++) {
        const double p = exp(s[t] - top);
        sum += p;
        for (uint32_t d = 0; d < l->dim; d++)
            out[d] += p * (double)v[(size_t)t * l->dim + d];
    }
    for (uint32_t d = 0; d < l->dim && n > 0; d++)
        out[d] /= sum;
    free(s);
    return n > 0 ? top + log(sum) : -INFINITY;
}

/* K and V of a KV head of a sequence as the CPU decodes them, [tokens][dim]; for the caller to free. */
void decode_rows(const layer *l, const sequences *s, uint32_t seq, uint32_t g, float *rows[2])
{
    const uint32_t n = (uint32_t)s->lengths[seq];

    for (int side = 0; side < 2; side++) {
        rows[side] = malloc(((size_t)n + 1) * l->dims[side] * 4);
        assert_non_null(rows[side]);
        for (uint32_t t = 0; t < n; t++)
            get_row(l, s->tiers[seq * s->tiers_stride + t / 64], g, (tqkv_side)side, (int32_t)t,
                    block_of(l, s, seq, t), t % 16, rows[side] + (size_t)t * l->dims[side]);
    }
}

/*
 * Checks the lse of a row that sees n tokens, and returns the relative error of its output. rounding: of a term of a
 * score, beside 1e-3 for all of it.
 */
double row_error(const layer *l, float *const rows[2], uint32_t n, const float *q, double scale,
                 double rounding, const float *out, float lse)
{
    double want[256], terms, error = 0, norm = 0;
    const double log_sum = attend(l, rows[0], rows[1], n, q, scale, want, &terms);
    const double tolerance = 1e-3 + rounding * terms;

    for (uint32_t d = 0; d < l->dim; d++) {
        const double difference = (double)out[d] - want[d];
        error += difference * difference;
        norm += want[d] * want[d];
    }
    if (n == 0) {
        assert_true(error == 0 && isinf(lse) && lse < 0);
        return 0;
    }
    if (!(fabs((double)lse - log_sum) <= tolerance))
        fprintf(stderr, "lse %g, not %g\n", (double)lse, log_sum);
    assert_true(fabs((double)lse - log_sum) <= tolerance);
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}
