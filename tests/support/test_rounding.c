/* SPDX-License-Identifier: Apache-2.0 */
#include "test_rounding.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "test_arrays.h"

void test_largest_query(const tqkv_codec *codec, uint32_t g, bool turns, int32_t base,
                        const float *q, double *top, double *moved)
{
    const uint32_t dim = codec->layer->shape.k_dim;
    float turned[TQKVI_DIM_MAX], cosine[TQKVI_DIM_MAX], sine[TQKVI_DIM_MAX];

    memcpy(turned, q, dim * sizeof(float));
    tqkvi_turn_init(&codec->rope, base, cosine, sine);
    if (turns)
        tqkvi_turn_apply(&codec->rope, cosine, sine, true, turned);
    for (uint32_t j = 0; j < dim; j++) {
        double sum = 0, terms = 0;
        for (uint32_t i = 0; i < dim; i++) {
            const double term =
                (double)codec->heads[0][g].inverse[(size_t)j * dim + i] * (double)turned[i];
            sum += term;
            terms += fabs(term);
        }
        if (j % 16 == 0 || terms * 0x1p-11 > moved[j / 16])
            moved[j / 16] = terms * 0x1p-11;
        top[j / 16] = j % 16 == 0 || fabs(sum) > top[j / 16] ? fabs(sum) : top[j / 16];
    }
}

double test_rounding_slack(const tqkv_codec *codec, uint32_t g, uint32_t tier, uint8_t scale,
                           const uint8_t *codes, const double *top, const double *moved)
{
    const tqkvi_layout *layout = tqkvi_codec_layout(codec, TQKV_SIDE_K, g, tier);
    const bool has_two_parts = layout->row_bytes > 10 * layout->n_units; /* 5 bits in the mean */
    float *y = test_aligned(TQKVI_DIM_MAX * sizeof(*y));
    double slack = 0;

    codec->kernels->unpack_rows(layout, codes, 1, y);
    const double steps = TQKVK_Q_MAX * (has_two_parts ? TQKVK_LOW_PARTS : 1);
    for (uint32_t d = 0; d < layout->n_units * 16; d++)
        slack += (.51 * top[d / 16] / steps + moved[d / 16]) * fabs((double)y[d]);
    free(y);
    return slack * (double)tqkvk_scale_value(scale);
}
