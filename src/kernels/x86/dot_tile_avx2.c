/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of a tile. A block of 3 queries and 4 keys keeps its 12 sums in registers while the
 * channels run: 7 loads for 12 multiply-adds. Left-over queries go one by one, which is
 * faster than blocks of two (2 x 64 keys of 64 channels, Zen 4: 182 ns against 201).
 */
#include "kernels/tables.h"
#include "kernels/x86/block_avx2.h"

#define K_BLOCK 4

static void dot_3(const float *q, const float *k, size_t n_k, size_t dim, float *s, size_t s_stride)
{
    for (size_t b = 0; b < n_k; b += K_BLOCK, k += K_BLOCK * dim) {
        tqkvk_four sum0 = tqkvk_four_zero(), sum1 = tqkvk_four_zero(), sum2 = tqkvk_four_zero();
        for (size_t i = 0; i < dim; i += 8) {
            const tqkvk_four keys = tqkvk_four_load(k + i, dim);
            sum0 = tqkvk_four_fma(sum0, keys, _mm256_load_ps(q + i));
            sum1 = tqkvk_four_fma(sum1, keys, _mm256_load_ps(q + dim + i));
            sum2 = tqkvk_four_fma(sum2, keys, _mm256_load_ps(q + 2 * dim + i));
        }
        _mm_storeu_ps(s + b, tqkvk_four_sums(sum0));
        _mm_storeu_ps(s + s_stride + b, tqkvk_four_sums(sum1));
        _mm_storeu_ps(s + 2 * s_stride + b, tqkvk_four_sums(sum2));
    }
}

/* Two blocks of keys: eight sums, so that additions do not wait for each other. */
static void dot_1(const float *q, const float *k, size_t n_k, size_t dim, float *s)
{
    for (size_t b = 0; b < n_k; b += 2 * K_BLOCK, k += 2 * K_BLOCK * dim) {
        tqkvk_four sum0 = tqkvk_four_zero(), sum1 = tqkvk_four_zero();
        for (size_t i = 0; i < dim; i += 8) {
            const __m256 query = _mm256_load_ps(q + i);
            sum0 = tqkvk_four_fma(sum0, tqkvk_four_load(k + i, dim), query);
            sum1 = tqkvk_four_fma(sum1, tqkvk_four_load(k + K_BLOCK * dim + i, dim), query);
        }
        _mm_storeu_ps(s + b, tqkvk_four_sums(sum0));
        _mm_storeu_ps(s + b + K_BLOCK, tqkvk_four_sums(sum1));
    }
}

void tqkvk_dot_tile_f32_avx2(const float *q, size_t n_q, const float *k, size_t n_k, size_t dim,
                             float *s, size_t s_stride)
{
    size_t a = 0;
    for (; a + 3 <= n_q; a += 3)
        dot_3(q + a * dim, k, n_k, dim, s + a * s_stride, s_stride);
    for (; a < n_q; a++)
        dot_1(q + a * dim, k, n_k, dim, s + a * s_stride);
}
