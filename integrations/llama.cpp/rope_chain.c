/* SPDX-License-Identifier: Apache-2.0 */
#include "rope_chain.h"

#include <math.h>
#include <string.h>

#include "ggml_host.h"

/* Words of the parameters of a ROPE node. */
enum {
    PARAM_N_DIMS = 1,
    PARAM_MODE = 2,
    PARAM_N_CTX_ORIG = 4,
    PARAM_FREQ_BASE = 5,
    PARAM_FREQ_SCALE = 6,
    PARAM_EXT_FACTOR = 7,
    PARAM_BETA_FAST = 9,
    PARAM_BETA_SLOW = 10,
    PARAM_FIRST_CHANNEL = 15
};

/* Kinds of pairing, part of the public interface of ggml. */
enum { MODE_PAIRS = 0, MODE_HALVES = 2, MODE_MROPE = 8, MODE_VISION = 24, MODE_IMROPE = 40 };

const ggml_tensor *tqkvp_rope_behind(const ggml_tensor *rows, bool in_part)
{
    enum { STEPS = 8 };
    const ggml_tensor *t = rows;

    for (int i = 0; t && i < STEPS; i++) {
        const tqkvp_op op = tqkvp_op_of(t);
        if (op == TQKVP_OP_ROPE)
            return t;
        if (op == TQKVP_OP_CONCAT && in_part) {
            const ggml_tensor *first = tqkvp_rope_behind(t->src[0], false);
            return first ? first : tqkvp_rope_behind(t->src[1], false);
        }
        if (op != TQKVP_OP_VIEW)
            return NULL;
        t = t->src[0];
    }
    return NULL;
}

static float param_f32(const ggml_tensor *node, int word)
{
    float x;

    memcpy(&x, &node->op_params[word], sizeof(x));
    return x;
}

/*
 * YaRN keeps the fast pairs as they are and slows the others down. The pair that makes `turns` full
 * turns over the original context is where one ends or begins.
 */
static double yarn_pair(const ggml_tensor *node, double turns)
{
    const double pi = 3.14159265358979323846;
    const double n_dims = node->op_params[PARAM_N_DIMS];
    const double n_ctx = node->op_params[PARAM_N_CTX_ORIG];
    const double base = param_f32(node, PARAM_FREQ_BASE);

    return n_dims * log(n_ctx / (turns * 2.0 * pi)) / (2.0 * log(base));
}

static double yarn_share_kept(const ggml_tensor *node, int pair)
{
    const double last = node->op_params[PARAM_N_DIMS] - 1;
    const double low = fmax(0.0, floor(yarn_pair(node, param_f32(node, PARAM_BETA_FAST))));
    const double high = fmin(last, ceil(yarn_pair(node, param_f32(node, PARAM_BETA_SLOW))));
    const double slope = (pair - low) / fmax(0.001, high - low);

    return 1.0 - fmin(1.0, fmax(0.0, slope));
}

bool tqkvp_rope_read(const ggml_tensor *node, uint32_t head_dim, tqkvp_rope *out)
{
    const int32_t n_rot = node->op_params[PARAM_N_DIMS];
    const int32_t mode = node->op_params[PARAM_MODE];
    const double base = param_f32(node, PARAM_FREQ_BASE);
    const double scale = param_f32(node, PARAM_FREQ_SCALE);
    const double ext = param_f32(node, PARAM_EXT_FACTOR);
    const ggml_tensor *factors = node->src[2];

    if (n_rot < 2 || n_rot % 2 || (uint32_t)n_rot > head_dim || n_rot / 2 > TQKVP_ROT_PAIRS_MAX ||
        node->op_params[PARAM_FIRST_CHANNEL] != 0 || !(base > 1.0))
        return false;
    if (mode == MODE_PAIRS)
        out->rope.style = TQKV_ROPE_PAIRS;
    else if (mode == MODE_HALVES || mode == MODE_MROPE || mode == MODE_IMROPE)
        out->rope.style = TQKV_ROPE_HALVES;
    else
        return false;
    if (factors &&
        (!factors->data || tqkvp_type_of(factors) != TQKVP_TYPE_F32 || factors->ne[0] < n_rot / 2))
        return false;

    for (int i = 0; i < n_rot / 2; i++) {
        double turn = pow(base, -2.0 * i / n_rot);
        if (factors)
            turn /= ((const float *)factors->data)[i];
        double kept = 0.0;
        if (ext != 0.0)
            kept = ext * yarn_share_kept(node, i);
        out->inv_freq[i] = (float)(turn * (scale * (1.0 - kept) + kept));
        if (!isfinite(out->inv_freq[i]))
            return false;
    }
    out->rope.n_rot = (uint32_t)n_rot;
    out->rope.inv_freq = out->inv_freq;
    return true;
}

bool tqkvp_rope_equal(const tqkv_rope *a, const tqkv_rope *b)
{
    if (a->style != b->style)
        return false;
    if (a->style == TQKV_ROPE_NONE)
        return true;
    if (a->n_rot != b->n_rot)
        return false;
    for (uint32_t i = 0; i < a->n_rot / 2; i++)
        if (fabsf(a->inv_freq[i] - b->inv_freq[i]) > 1e-4f * fabsf(b->inv_freq[i]))
            return false;
    return true;
}

const int32_t *tqkvp_rope_positions(const ggml_tensor *node, int64_t n)
{
    const ggml_tensor *positions = node->src[1];

    if (!positions || !positions->data || tqkvp_type_of(positions) != TQKVP_TYPE_I32 ||
        positions->ne[0] < n || node->ne[2] != n)
        return NULL;
    return positions->data;
}
