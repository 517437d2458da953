/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The calibration object behind calib.h: statistics of every layer, then a draft plan whose
 * transforms are fixed, sensitivities, and the solution for a profile.
 */
#ifndef TQKVI_CALIBRATION_H
#define TQKVI_CALIBRATION_H

#include "calib/observe.h"
#include "codec/layer_codec.h"
#include "format/plan_data.h"
#include "turboquant/calib.h"

/* One (layer, side): a group that is perturbed and measured together. */
typedef struct tqkvi_group {
    double *distortion;    /* [n_kv_heads * dim / 16] loss of a unit per unit of coding error */
    double sensitivity;    /* KL per unit of weighted distortion; 0 until measured */
} tqkvi_group;

struct tqkv_calib {
    tqkv_allocator mem;
    tqkv_logger log;
    char *model, *arch;
    uint32_t n_layers, frame_tokens, n_sinks;
    float gamma;
    tqkvi_layer_stats *layers; /* [n_layers]; n_kv_heads 0 until set */
    tqkvi_group *groups[2];    /* [n_layers] by side */
    tqkv_plan *draft;          /* after prepare: transforms, one tier whose widths perturb changes */
    tqkv_codec **codecs;       /* [n_layers] of the draft; NULL for a layer without a cache */
};

TQKV_NODISCARD tqkv_status tqkvi_calib_create(const tqkv_calib_config *config, tqkv_calib **out);
void tqkvi_calib_destroy(tqkv_calib *calib);
TQKV_NODISCARD tqkv_status tqkvi_calib_prepare(tqkv_calib *calib, const tqkv_parallel *parallel);
TQKV_NODISCARD tqkv_status tqkvi_calib_perturb(tqkv_calib *calib, uint32_t layer, tqkv_side side, float bits, size_t n,
                                const int32_t *positions, float *rows, double *distortion, const tqkv_parallel *parallel);
TQKV_NODISCARD tqkv_status tqkvi_calib_solve(tqkv_calib *calib, const tqkv_profile *profile, tqkv_plan **out);

/* Units of one (layer, side). */
uint32_t tqkvi_calib_units(const tqkv_calib *calib, uint32_t layer, tqkv_side side);
/* Mean loss of a unit per unit of coding error: distortion times the group's sensitivity (1 until measured). */
double tqkvi_calib_loss(const tqkv_calib *calib, uint32_t layer, tqkv_side side, uint32_t unit);

#endif /* TQKVI_CALIBRATION_H */
