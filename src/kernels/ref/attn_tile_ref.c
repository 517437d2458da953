/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/tables.h"

#include <math.h>

void tqkvk_dot_tile_f32_ref(const float *q, size_t n_q, const float *k, size_t n_k, size_t dim,
                            float *s, size_t s_stride)
{
    for (size_t a = 0; a < n_q; a++) {
        for (size_t b = 0; b < n_k; b++) {
            float sum = 0.0f;
            for (size_t i = 0; i < dim; i++)
                sum += q[a * dim + i] * k[b * dim + i];
            s[a * s_stride + b] = sum;
        }
    }
}

void tqkvk_scale_scores_f32_ref(float *s, const float *scale, size_t n, float q_mean)
{
    for (size_t b = 0; b < n; b++)
        s[b] = scale[b] == 0.0f ? 0.0f : s[b] * scale[b] + q_mean;
}

float tqkvk_scale_weights_f32_ref(float *p, const float *scale, size_t n)
{
    float sum = 0.0f;
    for (size_t b = 0; b < n; b++) {
        sum += scale[b] == 0.0f ? 0.0f : p[b];
        p[b] *= scale[b];
    }
    return sum;
}

float tqkvk_softmax_step_f32_ref(float *s, size_t n, float *m, float *l)
{
    float top = *m;
    for (size_t b = 0; b < n; b++)
        top = s[b] > top ? s[b] : top;
    if (top == -INFINITY) {
        for (size_t b = 0; b < n; b++)
            s[b] = 0.0f;
        return 1.0f;
    }

    const float factor = expf(*m - top);
    float sum = 0.0f;
    for (size_t b = 0; b < n; b++) {
        s[b] = expf(s[b] - top);
        sum += s[b];
    }
    *m = top;
    *l = *l * factor + sum;
    return factor;
}

void tqkvk_accumulate_tile_f32_ref(const float *p, size_t p_stride, size_t n_q, const float *v,
                                   size_t n_k, size_t dim, const float *f, float *o)
{
    for (size_t a = 0; a < n_q; a++) {
        for (size_t i = 0; i < dim; i++) {
            float sum = o[a * dim + i] * f[a];
            for (size_t b = 0; b < n_k; b++)
                sum += p[a * p_stride + b] * v[b * dim + i];
            o[a * dim + i] = sum;
        }
    }
}
