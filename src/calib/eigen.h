/* SPDX-License-Identifier: Apache-2.0 */
/* Eigenvectors of small symmetric matrices, for the transforms of calibration. */
#ifndef TQKVI_EIGEN_H
#define TQKVI_EIGEN_H

#include <stdbool.h>
#include <stddef.h>

/*
 * a: [n][n] symmetric f64; becomes the eigenvectors, one a row, of falling eigenvalue.
 * values: [n] out, falling. work: [n] scratch. The sign of a vector makes its largest
 * component positive, so the result depends on the matrix alone.
 * Householder to tridiagonal form, then QL with implicit shifts (Golub and Van Loan, Matrix
 * Computations, 8.3). Returns false when a value does not converge (NaN or Inf in the matrix).
 */
bool tqkvi_eigen_symmetric(double *a, size_t n, double *values, double *work);

#endif /* TQKVI_EIGEN_H */
