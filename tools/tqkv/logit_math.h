/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compares two rows of logits: KL divergence, perplexity, best token.
 *
 * With p = softmax(base), q = softmax(test) and L the logarithm of the sum of exponentials,
 *     KL(p || q) = sum p (base - test) - (L_base - L_test).
 * Exponentials are f32 (relative error below 3e-7), every sum is f64.
 */
#ifndef TQKV_LOGIT_MATH_H
#define TQKV_LOGIT_MATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct logit_base {
    float largest;
    double log_sum; /* L */
    size_t best;    /* first index of the largest logit */
} logit_base;

void logit_base_init(logit_base *out, const float *base, size_t n);

typedef struct logit_diff {
    double kl;
    double log_sum_test;
    bool has_same_best;
} logit_diff;

void logit_compare(logit_diff *out, const logit_base *stats, const float *base, const float *test,
                   size_t n);

#endif /* TQKV_LOGIT_MATH_H */
