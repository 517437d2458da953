/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows times matrix. Lanes are outputs, so that each output keeps its order of additions; eight
 * vectors of outputs stay in registers while i runs, which hides the latency of the additions: of
 * one row 64 outputs, or of four rows 16, which then share what is read of the matrix.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_avx2.h"

static void transform_64(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four lo = tqkvk_four_zero();
    tqkvk_four hi = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        const __m256 xi = _mm256_broadcast_ss(x + i);
        lo = tqkvk_four_fma(lo, tqkvk_four_load(m, 8), xi);
        hi = tqkvk_four_fma(hi, tqkvk_four_load(m + 32, 8), xi);
    }
    tqkvk_four_store(y, lo);
    tqkvk_four_store(y + 32, hi);
}

static void transform_16(const float *m, const float *x, float *y, size_t dim)
{
    __m256 lo = _mm256_setzero_ps();
    __m256 hi = _mm256_setzero_ps();
    for (size_t i = 0; i < dim; i++, m += dim) {
        const __m256 xi = _mm256_broadcast_ss(x + i);
        lo = _mm256_fmadd_ps(_mm256_load_ps(m), xi, lo);
        hi = _mm256_fmadd_ps(_mm256_load_ps(m + 8), xi, hi);
    }
    _mm256_store_ps(y, lo);
    _mm256_store_ps(y + 8, hi);
}

/* One vector of the matrix times the same channel of four rows. */
static inline tqkvk_four four_rows_fma(tqkvk_four sum, __m256 m, const float *x, size_t dim)
{
    return (tqkvk_four){_mm256_fmadd_ps(m, _mm256_broadcast_ss(x), sum.v0),
                        _mm256_fmadd_ps(m, _mm256_broadcast_ss(x + dim), sum.v1),
                        _mm256_fmadd_ps(m, _mm256_broadcast_ss(x + 2 * dim), sum.v2),
                        _mm256_fmadd_ps(m, _mm256_broadcast_ss(x + 3 * dim), sum.v3)};
}

static inline void store_four_rows(float *y, size_t dim, tqkvk_four a)
{
    _mm256_store_ps(y, a.v0);
    _mm256_store_ps(y + dim, a.v1);
    _mm256_store_ps(y + 2 * dim, a.v2);
    _mm256_store_ps(y + 3 * dim, a.v3);
}

static void transform_4_16(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four lo = tqkvk_four_zero();
    tqkvk_four hi = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        lo = four_rows_fma(lo, _mm256_load_ps(m), x + i, dim);
        hi = four_rows_fma(hi, _mm256_load_ps(m + 8), x + i, dim);
    }
    store_four_rows(y, dim, lo);
    store_four_rows(y + 8, dim, hi);
}

void tqkvk_transform_f32_avx2(const float *m, const float *x, float *y, size_t dim, size_t n_rows)
{
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        for (size_t j = 0; j < dim; j += 16)
            transform_4_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
    for (; r < n_rows; r++) {
        size_t j = 0;
        for (; j + 64 <= dim; j += 64)
            transform_64(m + j, x + r * dim, y + r * dim + j, dim);
        for (; j < dim; j += 16)
            transform_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
}

/* Sums with the other one of the pair; sign: -1 for the second ones. The product is exact. */
static inline __m256 butterfly(__m256 v, __m256 swapped, __m256 sign)
{
    return _mm256_fmadd_ps(v, sign, swapped);
}

/* Eight channels times their factors, then pairs 1, 2 and 4 apart. */
static inline __m256 butterflies_of_8(const float *factor, const float *x)
{
    __m256 v = _mm256_mul_ps(_mm256_load_ps(factor), _mm256_loadu_ps(x));
    v = butterfly(v, _mm256_permute_ps(v, 0xb1), _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1));
    v = butterfly(v, _mm256_permute_ps(v, 0x4e), _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1));
    return butterfly(v, _mm256_permute2f128_ps(v, v, 1),
                     _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1));
}

/* Pairs n vectors apart, and then 2 n, of four. */
static inline tqkvk_four butterflies_of_four(tqkvk_four a)
{
    const __m256 b0 = _mm256_add_ps(a.v0, a.v1), b1 = _mm256_sub_ps(a.v0, a.v1);
    const __m256 b2 = _mm256_add_ps(a.v2, a.v3), b3 = _mm256_sub_ps(a.v2, a.v3);
    return (tqkvk_four){_mm256_add_ps(b0, b2), _mm256_add_ps(b1, b3), _mm256_sub_ps(b0, b2),
                        _mm256_sub_ps(b1, b3)};
}

static inline void store_step(float *y, size_t n, tqkvk_four a)
{
    _mm256_store_ps(y, a.v0);
    _mm256_store_ps(y + n, a.v1);
    _mm256_store_ps(y + 2 * n, a.v2);
    _mm256_store_ps(y + 3 * n, a.v3);
}

/* 32 channels times their factors, then all pairs up to 16 apart. */
static inline tqkvk_four butterflies_of_32(const float *factor, const float *x)
{
    return butterflies_of_four((tqkvk_four){
        butterflies_of_8(factor, x), butterflies_of_8(factor + 8, x + 8),
        butterflies_of_8(factor + 16, x + 16), butterflies_of_8(factor + 24, x + 24)});
}

static inline tqkvk_four four_add(tqkvk_four a, tqkvk_four b)
{
    return (tqkvk_four){_mm256_add_ps(a.v0, b.v0), _mm256_add_ps(a.v1, b.v1),
                        _mm256_add_ps(a.v2, b.v2), _mm256_add_ps(a.v3, b.v3)};
}

static inline tqkvk_four four_sub(tqkvk_four a, tqkvk_four b)
{
    return (tqkvk_four){_mm256_sub_ps(a.v0, b.v0), _mm256_sub_ps(a.v1, b.v1),
                        _mm256_sub_ps(a.v2, b.v2), _mm256_sub_ps(a.v3, b.v3)};
}

static void hadamard_16(const float *factor, const float *x, float *y, size_t dim)
{
    for (size_t i = 0; i < dim; i += 16) {
        const __m256 a = butterflies_of_8(factor + i, x + i);
        const __m256 b = butterflies_of_8(factor + i + 8, x + i + 8);
        _mm256_store_ps(y + i, _mm256_add_ps(a, b));
        _mm256_store_ps(y + i + 8, _mm256_sub_ps(a, b));
    }
}

/* Sixty-four channels stay in registers for the pairs up to 32 apart. */
void tqkvk_hadamard_f32_avx2(const float *factor, const float *x, float *y, size_t dim,
                             size_t block)
{
    if (block == 16) {
        hadamard_16(factor, x, y, dim);
        return;
    }
    for (size_t i = 0; i < dim; i += 32) {
        const tqkvk_four a = butterflies_of_32(factor + i, x + i);
        if (block == 32) {
            tqkvk_four_store(y + i, a);
            continue;
        }
        i += 32;
        const tqkvk_four b = butterflies_of_32(factor + i, x + i);
        tqkvk_four_store(y + i - 32, four_add(a, b));
        tqkvk_four_store(y + i, four_sub(a, b));
    }
    size_t n = 64;
    for (; 4 * n <= block; n *= 4) {
        for (size_t first = 0; first < dim; first += 4 * n) {
            for (size_t i = first; i < first + n; i += 8)
                store_step(y + i, n, butterflies_of_four(tqkvk_four_load(y + i, n)));
        }
    }
    for (size_t first = 0; 2 * n <= block && first < dim; first += 2 * n) {
        for (size_t i = first; i < first + n; i += 8) {
            const __m256 a = _mm256_load_ps(y + i), b = _mm256_load_ps(y + i + n);
            _mm256_store_ps(y + i, _mm256_add_ps(a, b));
            _mm256_store_ps(y + i + n, _mm256_sub_ps(a, b));
        }
    }
}
