/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transform of a head. With C the covariance of the values and M the attention metric:
 *
 *     A = M^(gamma/2)         errors are measured along the model's own sensitivities
 *     A C A = U' L U          falling eigenvalues: strong channels first
 *     T = S^-1 H U A          H: Hadamard within each band; S: standard deviation of the band
 *
 * so that y = T (x - mean) has unit variance and alike channels in every band, and an error of one
 * step costs S^2 of the metric. gamma < 1 shrinks the metric: its own estimate is noisy.
 */
#include "calib/fit.h"

#include <math.h>
#include <string.h>

#include "calib/eigen.h"

/* Directions that no sampled query looked along still count this share of the mean. */
static const double METRIC_FLOOR = 1e-3;
/* Least variance of a direction, as a share of the largest: below it f32 rows hold only noise. */
static const double VARIANCE_FLOOR = 1e-9;

uint32_t tqkvi_fit_band(uint32_t dim)
{
    if (dim >= 256 && dim % 64 == 0)
        return 64;
    return TQKV_UNIT_CHANNELS;
}

typedef struct fit_work {
    double *metric; /* [d][d] eigenvectors of M in rows */
    double *mval;   /* [d] */
    double *a;      /* [d][d] A */
    double *z;      /* [d][d] eigenvectors of A C A in rows */
    double *zval;   /* [d] */
    double *tmp;    /* [d][d] */
    double *vec;    /* [d] */
} fit_work;

/* out = sum over eigenvectors e (rows of vecs) of f_e e e' */
static void from_spectrum(const double *vecs, const double *f, size_t d, double *out)
{
    memset(out, 0, d * d * sizeof(*out));
    for (size_t e = 0; e < d; e++)
        for (size_t i = 0; i < d; i++) {
            const double x = f[e] * vecs[e * d + i];

            for (size_t j = 0; j < d; j++)
                out[i * d + j] += x * vecs[e * d + j];
        }
}

/* out = a b, all [d][d] */
static void multiply(const double *a, const double *b, size_t d, double *out)
{
    memset(out, 0, d * d * sizeof(*out));
    for (size_t i = 0; i < d; i++)
        for (size_t k = 0; k < d; k++) {
            const double x = a[i * d + k];

            for (size_t j = 0; j < d; j++)
                out[i * d + j] += x * b[k * d + j];
        }
}

/* Eigenvectors of the metric into w->metric, its floored eigenvalues into w->mval; A into w->a. */
static bool metric_power(const tqkvi_moments *m, size_t d, float gamma, fit_work *w)
{
    double trace = 0.0;

    for (size_t i = 0; i < d; i++)
        trace += m->metric[i * d + i];
    if (!isfinite(trace))
        return false;
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) /* nothing seen: every direction alike */
            w->metric[i * d + j] = trace > 0.0 ? m->metric[i * d + j] : (i == j ? 1.0 : 0.0);
    if (!tqkvi_eigen_symmetric(w->metric, d, w->mval, w->vec))
        return false;
    trace = trace > 0.0 ? trace : (double)d;
    for (size_t i = 0; i < d; i++) {
        w->mval[i] = fmax(w->mval[i], METRIC_FLOOR * trace / (double)d);
        w->vec[i] = pow(w->mval[i], 0.5 * (double)gamma);
    }
    from_spectrum(w->metric, w->vec, d, w->a);
    return true;
}

/* Eigenvectors of A C A into w->z, variances into w->zval. */
static bool weighted_spectrum(const tqkvi_moments *m, size_t d, fit_work *w)
{
    const double n = (double)m->n;

    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++)
            w->z[i * d + j] = m->outer[i * d + j] / n - m->sum[i] / n * (m->sum[j] / n);
    multiply(w->a, w->z, d, w->tmp);
    multiply(w->tmp, w->a, d, w->z);
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < i; j++)
            w->z[i * d + j] = w->z[j * d + i] = 0.5 * (w->z[i * d + j] + w->z[j * d + i]);
    if (!tqkvi_eigen_symmetric(w->z, d, w->zval, w->vec))
        return false;
    if (!(w->zval[0] > 0.0)) {
        for (size_t i = 0; i < d; i++)
            w->zval[i] = 1.0; /* a constant head: any transform will do */
        return true;
    }
    for (size_t i = 0; i < d; i++)
        w->zval[i] = fmax(w->zval[i], VARIANCE_FLOOR * w->zval[0]);
    return true;
}

/* Rows of one band: y = (1 / sigma) Hadamard (rows), rows: [band][d] in place. */
static void mix_band(double *rows, size_t band, size_t d, double sigma)
{
    for (size_t half = 1; half < band; half *= 2)
        for (size_t i = 0; i < band; i += 2 * half)
            for (size_t j = i; j < i + half; j++)
                for (size_t k = 0; k < d; k++) {
                    const double x = rows[j * d + k], y = rows[(j + half) * d + k];

                    rows[j * d + k] = x + y;
                    rows[(j + half) * d + k] = x - y;
                }
    for (size_t i = 0; i < band * d; i++)
        rows[i] /= sigma * sqrt((double)band);
}

/* Transform rows (output channel by output channel) into w->tmp, distortion per unit. */
static void banded_rows(fit_work *w, size_t d, float gamma, double *distortion)
{
    const size_t band = tqkvi_fit_band((uint32_t)d);

    multiply(w->z, w->a, d, w->tmp);
    for (size_t b = 0; b < d; b += band) {
        double variance = 0.0, cost = 0.0;

        for (size_t j = b; j < b + band; j++) {
            variance += w->zval[j] / (double)band;
            /* u' M^(1 - gamma) u: what an error along this direction costs after A is undone */
            for (size_t e = 0; e < d; e++) {
                double dot = 0.0;

                for (size_t i = 0; i < d; i++)
                    dot += w->metric[e * d + i] * w->z[j * d + i];
                cost += dot * dot * pow(w->mval[e], 1.0 - (double)gamma) / (double)band;
            }
        }
        mix_band(w->tmp + b * d, band, d, sqrt(variance));
        for (size_t u = b / TQKV_UNIT_CHANNELS; u < (b + band) / TQKV_UNIT_CHANNELS; u++)
            distortion[u] = variance * cost;
    }
}

static void store_head(const tqkvi_moments *m, const fit_work *w, uint32_t d, tqkvi_head_plan *head,
                       const double *distortion)
{
    const uint32_t n_units = d / TQKV_UNIT_CHANNELS;
    double mean = 0.0;

    for (uint32_t i = 0; i < d; i++)
        head->mean[i] = (float)((double)m->shift[i] + m->sum[i] / (double)m->n);
    for (uint32_t i = 0; i < d; i++)
        for (uint32_t j = 0; j < d; j++)
            head->transform[(size_t)i * d + j] = (float)w->tmp[(size_t)j * d + i];
    tqkvi_transform_round(head->transform, d);
    for (uint32_t u = 0; u < n_units; u++)
        mean += distortion[u] / (double)n_units;
    for (uint32_t u = 0; u < n_units; u++)
        head->weight[u] = (float)(distortion[u] / mean);
}

tqkv_status tqkvi_fit_head(const tqkvi_moments *m, const tqkv_allocator *mem, uint32_t dim, float gamma,
                           tqkvi_head_plan *head, double *distortion)
{
    const size_t d = dim, square = d * d;
    double *memory;
    fit_work w;
    tqkv_status status = TQKV_ERR_INVALID_ARG;

    if (m->n == 0)
        return TQKV_ERR_INVALID_ARG;
    memory = tqkvi_alloc(mem, (4 * square + 3 * d) * sizeof(*memory));
    if (!memory)
        return TQKV_ERR_NO_MEMORY;
    w = (fit_work){.metric = memory,
                   .a = memory + square,
                   .z = memory + 2 * square,
                   .tmp = memory + 3 * square,
                   .mval = memory + 4 * square,
                   .zval = memory + 4 * square + d,
                   .vec = memory + 4 * square + 2 * d};
    if (metric_power(m, d, gamma, &w) && weighted_spectrum(m, d, &w)) {
        banded_rows(&w, d, gamma, distortion);
        store_head(m, &w, dim, head, distortion);
        status = TQKV_OK;
    }
    tqkvi_free(mem, memory);
    return status;
}
