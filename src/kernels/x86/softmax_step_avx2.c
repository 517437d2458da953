/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scales of scores and weights, and one step of the online softmax between them. exp(x) is 2^n * e^r
 * with n = round(x / ln 2) and e^r by a polynomial on |r| <= ln 2 / 2 (coefficients of Cephes' expf;
 * error below 2 ulp).
 */
#include <immintrin.h>
#include <math.h>

#include "kernels/tables.h"
#include "kernels/x86/lanes_avx2.h"

#define EXP_MIN (-87.33654f) /* e^x is below 2^-126 under it */

void tqkvk_scale_scores_f32_avx2(float *s, const float *scale, size_t n, float q_mean)
{
    const __m256 mean = _mm256_set1_ps(q_mean);

    for (size_t b = 0; b < n; b += 8) {
        const __m256 size = _mm256_load_ps(scale + b);
        const __m256 some = _mm256_cmp_ps(size, _mm256_setzero_ps(), _CMP_NEQ_OQ);
        const __m256 score = _mm256_fmadd_ps(_mm256_loadu_ps(s + b), size, mean);
        _mm256_storeu_ps(s + b, _mm256_and_ps(score, some));
    }
}

float tqkvk_scale_weights_f32_avx2(float *p, const float *scale, size_t n)
{
    __m256 sum = _mm256_setzero_ps();

    for (size_t b = 0; b < n; b += 8) {
        const __m256 size = _mm256_load_ps(scale + b), weight = _mm256_loadu_ps(p + b);
        const __m256 some = _mm256_cmp_ps(size, _mm256_setzero_ps(), _CMP_NEQ_OQ);
        sum = _mm256_add_ps(sum, _mm256_and_ps(weight, some));
        _mm256_storeu_ps(p + b, _mm256_mul_ps(weight, size));
    }
    return tqkvk_sum_lanes(sum);
}

/* x <= 0. Below EXP_MIN, and for -inf, 0. */
static inline __m256 exp_not_positive(__m256 x)
{
    const __m256 too_small = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_MIN), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts: n times the first one is exact. */
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);

    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
    p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));

    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    return _mm256_andnot_ps(too_small, power);
}

float tqkvk_softmax_step_f32_avx2(float *s, size_t n, float *m, float *l)
{
    __m256 top = _mm256_set1_ps(*m);
    for (size_t b = 0; b < n; b += 8)
        top = _mm256_max_ps(top, _mm256_loadu_ps(s + b));
    const float m_new = tqkvk_max_lanes(top);
    if (m_new == -INFINITY) {
        for (size_t b = 0; b < n; b += 8)
            _mm256_storeu_ps(s + b, _mm256_setzero_ps());
        return 1.0f;
    }

    const __m256 shift = _mm256_set1_ps(m_new);
    __m256 sum = _mm256_setzero_ps();
    for (size_t b = 0; b < n; b += 8) {
        const __m256 e = exp_not_positive(_mm256_sub_ps(_mm256_loadu_ps(s + b), shift));
        _mm256_storeu_ps(s + b, e);
        sum = _mm256_add_ps(sum, e);
    }
    const float factor = _mm256_cvtss_f32(exp_not_positive(_mm256_set1_ps(*m - m_new)));
    *m = m_new;
    *l = *l * factor + tqkvk_sum_lanes(sum);
    return factor;
}
