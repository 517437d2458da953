/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Symmetric eigenproblem: A = Q T Q' with T tridiagonal by Householder reflections, then T is
 * diagonalised by QL sweeps whose rotations are applied to Q. Q is kept transposed (vectors in
 * rows), so that every inner loop runs over contiguous memory.
 */
#include "calib/eigen.h"

#include <math.h>

enum { QL_SWEEPS_MAX = 60 }; /* per value; three are usual */
static const double ROUNDING = 1e-14; /* of the largest element */

/* Householder vector of x[0..n) in place: (I - beta v v') x = alpha e0, v[0] = 1 implied by scaling. Returns beta. */
static double householder(double *x, size_t n, double *alpha)
{
    double tail = 0.0, norm, head;

    for (size_t i = 1; i < n; i++)
        tail += x[i] * x[i];
    *alpha = x[0];
    if (tail == 0.0)
        return 0.0;
    norm = sqrt(x[0] * x[0] + tail);
    head = x[0] > 0.0 ? -tail / (x[0] + norm) : x[0] - norm; /* no cancellation */
    for (size_t i = 1; i < n; i++)
        x[i] /= head;
    x[0] = 1.0;
    *alpha = norm;
    return 2.0 * head * head / (tail + head * head);
}

/*
 * Reduces a to tridiagonal form: diagonal d, sub-diagonal e (e[k] couples k and k + 1). The
 * reflection vectors stay in the rows of a above the diagonal; beta: [n].
 */
static void tridiagonalise(double *a, size_t n, double *d, double *e, double *beta)
{
    for (size_t k = 0; k + 1 < n; k++) {
        double *v = a + k * n + k + 1; /* row k right of the diagonal */
        const size_t m = n - k - 1;
        double *p = d; /* d[k + 1 ..] is not yet used: scratch */
        double b, vp = 0.0;

        d[k] = a[k * n + k];
        b = householder(v, m, &e[k]);
        beta[k] = b;
        if (b == 0.0)
            continue;
        p += k + 1;
        for (size_t i = 0; i < m; i++) {
            const double *row = a + (k + 1 + i) * n + k + 1;
            double sum = 0.0;

            for (size_t j = 0; j < m; j++)
                sum += row[j] * v[j];
            p[i] = b * sum;
            vp += p[i] * v[i];
        }
        for (size_t i = 0; i < m; i++)
            p[i] -= 0.5 * b * vp * v[i];
        for (size_t i = 0; i < m; i++) {
            double *row = a + (k + 1 + i) * n + k + 1;

            for (size_t j = 0; j < m; j++)
                row[j] -= v[i] * p[j] + p[i] * v[j];
        }
    }
    d[n - 1] = a[n * n - 1];
    e[n - 1] = 0.0;
    beta[n - 1] = 0.0;
}

/* Turns the reflections in a into Q' (row i of Q' is column i of Q), in place from the last reflection back. */
static void form_basis(double *a, size_t n, const double *beta)
{
    a[n * n - 1] = 1.0;
    for (size_t kk = n - 1; kk-- > 0;) {
        const size_t k = kk, m = n - k - 1;
        double *v = a + k * n + k + 1;

        /* rows k + 1 .. of Q' act on components k + 1 ..: q <- q - beta (q.v) v */
        for (size_t i = 0; i < m && beta[k] != 0.0; i++) {
            double *q = a + (k + 1 + i) * n + k + 1;
            double dot = 0.0;

            for (size_t j = 0; j < m; j++)
                dot += q[j] * v[j];
            dot *= beta[k];
            for (size_t j = 0; j < m; j++)
                q[j] -= dot * v[j];
        }
        a[k * n + k] = 1.0;
        for (size_t j = 0; j < m; j++) {
            v[j] = 0.0;
            a[(k + 1 + j) * n + k] = 0.0;
        }
    }
}

static void rotate_rows(double *r0, double *r1, size_t n, double c, double s)
{
    for (size_t i = 0; i < n; i++) {
        const double f = r1[i];

        r1[i] = s * r0[i] + c * f;
        r0[i] = c * r0[i] - s * f;
    }
}

/* One implicit QL sweep on the block [l, m]. */
static void ql_sweep(double *q, size_t n, double *d, double *e, size_t l, size_t m)
{
    double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
    const double r0 = hypot(g, 1.0);
    double s = 1.0, c = 1.0, p = 0.0;

    g = d[m] - d[l] + e[l] / (g + (g >= 0.0 ? r0 : -r0));
    for (size_t i = m; i-- > l;) {
        const double f = s * e[i], b = c * e[i];
        double r = hypot(f, g);

        e[i + 1] = r;
        if (r == 0.0) { /* the block splits here */
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        rotate_rows(q + i * n, q + (i + 1) * n, n, c, s);
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
}

/*
 * Among values that are nothing but rounding the sweeps may never end. There an element outside the
 * diagonal is dropped: it moves values by less than rounding has moved them already.
 */
static bool diagonalise(double *q, size_t n, double *d, double *e)
{
    double rounding = 0.0;

    for (size_t i = 0; i < n; i++)
        rounding = fmax(rounding, ROUNDING * (fabs(d[i]) + fabs(e[i])));
    for (size_t l = 0; l < n; l++) {
        for (int sweep = 0;; sweep++) {
            size_t m = l;

            while (m + 1 < n) {
                const double size = fabs(d[m]) + fabs(d[m + 1]);

                if (fabs(e[m]) <= 1e-16 * size || e[m] == 0.0)
                    break;
                m++;
            }
            if (m == l)
                break;
            if (!isfinite(d[l]) || !isfinite(e[l]))
                return false;
            if (sweep == QL_SWEEPS_MAX) {
                if (fabs(e[l]) > rounding)
                    return false;
                e[l] = 0.0;
                break;
            }
            ql_sweep(q, n, d, e, l, m);
        }
    }
    return true;
}

/* Selection sort by falling value; n is at most 1024 and rows are swapped whole. */
static void sort_falling(double *q, size_t n, double *d)
{
    for (size_t i = 0; i < n; i++) {
        size_t best = i, big = 0;
        double *row = q + i * n;

        for (size_t j = i + 1; j < n; j++)
            if (d[j] > d[best])
                best = j;
        if (best != i) {
            const double value = d[i];

            d[i] = d[best];
            d[best] = value;
            for (size_t j = 0; j < n; j++) {
                const double x = row[j];

                row[j] = q[best * n + j];
                q[best * n + j] = x;
            }
        }
        for (size_t j = 1; j < n; j++)
            if (fabs(row[j]) > fabs(row[big]))
                big = j;
        if (row[big] < 0.0)
            for (size_t j = 0; j < n; j++)
                row[j] = -row[j];
    }
}

bool tqkvi_eigen_symmetric(double *a, size_t n, double *values, double *work)
{
    double beta[1024]; /* heads have at most TQKV_UNITS_MAX * 16 channels */

    if (n == 0 || n > sizeof(beta) / sizeof(beta[0]))
        return false;
    tridiagonalise(a, n, values, work, beta);
    form_basis(a, n, beta);
    if (!diagonalise(a, n, values, work))
        return false;
    sort_falling(a, n, values);
    return true;
}
