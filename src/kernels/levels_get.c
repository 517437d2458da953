/* SPDX-License-Identifier: Apache-2.0 */
/* What other modules may know of the tables in levels.c. */
#include "kernels/kernels.h"
#include "kernels/levels.h"

static const tqkvk_width *find(uint32_t bits)
{
    static const tqkvk_width none = {.distortion = 1.0};
    return bits < sizeof(tqkvk_widths) / sizeof(tqkvk_widths[0]) && bits != 0 ? &tqkvk_widths[bits]
                                                                              : &none;
}

float tqkvk_scale_value(uint8_t scale)
{
    return tqkvk_scale_values[scale];
}

float tqkvk_step(uint32_t bits)
{
    return find(bits)->step;
}

const int8_t *tqkvk_levels(uint32_t bits)
{
    return find(bits)->levels;
}

double tqkvk_distortion(uint32_t bits)
{
    return bits == TQKVI_BITS_PLAIN ? 0.0 : find(bits)->distortion;
}
