/* SPDX-License-Identifier: Apache-2.0 */
/* As softmax_step_avx2.c, with vectors of sixteen; 2^n is an instruction here. */
#include <immintrin.h>
#include <math.h>

#include "kernels/tables.h"

#define EXP_MIN (-87.33654f) /* e^x is below 2^-126 under it */

/* The lower half of the last vector where n is not a multiple of 16. */
static inline __mmask16 lanes(size_t b, size_t n)
{
    return n - b >= 16 ? 0xffff : 0xff;
}

void tqkvk_scale_scores_f32_avx512(float *s, const float *scale, size_t n, float q_mean)
{
    const __m512 mean = _mm512_set1_ps(q_mean);

    for (size_t b = 0; b < n; b += 16) {
        const __m512 size = _mm512_load_ps(scale + b);
        const __mmask16 some = _mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        const __m512 score = _mm512_maskz_fmadd_ps(some, _mm512_loadu_ps(s + b), size, mean);
        _mm512_storeu_ps(s + b, score);
    }
}

float tqkvk_scale_weights_f32_avx512(float *p, const float *scale, size_t n)
{
    __m512 sum = _mm512_setzero_ps();

    for (size_t b = 0; b < n; b += 16) {
        const __m512 size = _mm512_load_ps(scale + b), weight = _mm512_loadu_ps(p + b);
        const __mmask16 some = _mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        sum = _mm512_mask_add_ps(sum, some, sum, weight);
        _mm512_storeu_ps(p + b, _mm512_mul_ps(weight, size));
    }
    return _mm512_reduce_add_ps(sum);
}

/* x <= 0. Below EXP_MIN, and for -inf, 0. */
static inline __m512 exp_not_positive(__m512 x)
{
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_MIN), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts: n times the first one is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);

    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
    p = _mm512_add_ps(p, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, p, n);
}

float tqkvk_softmax_step_f32_avx512(float *s, size_t n, float *m, float *l)
{
    __m512 top = _mm512_set1_ps(*m);
    for (size_t b = 0; b < n; b += 16)
        top = _mm512_mask_max_ps(top, lanes(b, n), top, _mm512_maskz_loadu_ps(lanes(b, n), s + b));
    const float m_new = _mm512_reduce_max_ps(top);
    if (m_new == -INFINITY) {
        for (size_t b = 0; b < n; b += 16)
            _mm512_mask_storeu_ps(s + b, lanes(b, n), _mm512_setzero_ps());
        return 1.0f;
    }

    const __m512 shift = _mm512_set1_ps(m_new);
    __m512 sum = _mm512_setzero_ps();
    for (size_t b = 0; b < n; b += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(lanes(b, n), s + b);
        const __m512 e = exp_not_positive(_mm512_sub_ps(x, shift));
        _mm512_mask_storeu_ps(s + b, lanes(b, n), e);
        sum = _mm512_mask_add_ps(sum, lanes(b, n), sum, e);
    }
    const float factor = _mm512_cvtss_f32(exp_not_positive(_mm512_set1_ps(*m - m_new)));
    *m = m_new;
    *l = *l * factor + _mm512_reduce_add_ps(sum);
    return factor;
}
