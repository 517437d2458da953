/* SPDX-License-Identifier: Apache-2.0 */
/* calib.h: checks the arguments, then calls src/calib. */
#include <math.h>
#include <string.h>

#include "base/log.h"
#include "calib/calibration.h"

enum { TOKENS_MIN = 32, TOKENS_MAX = 1 << 20 };

void tqkv_calib_config_init(tqkv_calib_config *config)
{
    /* frame_tokens and gamma: docs/QUALITY.md "What was tried" */
    *config = (tqkv_calib_config){.struct_bytes = sizeof(*config),
                                  .model = "",
                                  .arch = "",
                                  .frame_tokens = 1024,
                                  .gamma = 0.5F,
                                  .n_sinks = 4};
}

tqkv_status tqkv_calib_create(const tqkv_calib_config *config, tqkv_calib **out)
{
    if (out)
        *out = NULL;
    if (!config || !out || config->struct_bytes < sizeof(*config) || config->n_layers == 0 ||
        config->n_layers > 4096 || config->frame_tokens == 0 || config->frame_tokens > 65536 ||
        config->n_sinks > 64 || !(config->gamma >= 0.0F && config->gamma <= 1.0F))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_calib_create(config, out);
}

void tqkv_calib_destroy(tqkv_calib *calib)
{
    tqkvi_calib_destroy(calib);
}

static bool good_dim(uint32_t dim)
{
    return dim > 0 && dim % TQKV_UNIT_CHANNELS == 0 && dim <= TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS;
}

tqkv_status tqkv_calib_set_layer(tqkv_calib *calib, uint32_t layer, const tqkv_plan_layer *shape, const float *w_o,
                                 size_t n_out, uint32_t resident, const tqkv_parallel *parallel)
{
    if (!calib || calib->draft || layer >= calib->n_layers || !shape || calib->layers[layer].shape.n_kv_heads)
        return TQKV_ERR_INVALID_ARG;
    if (shape->n_kv_heads == 0 || shape->n_heads % shape->n_kv_heads || !good_dim(shape->k_dim) ||
        !good_dim(shape->v_dim) || shape->rope.n_rot > shape->k_dim || shape->rope.n_rot % 2 ||
        (shape->rope.n_rot && !shape->rope.inv_freq) || shape->is_latent > (shape->n_kv_heads == 1)) {
        tqkvi_log(&calib->log, TQKV_LOG_ERROR, "layer %u: heads %u/%u with %u and %u channels cannot be coded", layer,
                  shape->n_heads, shape->n_kv_heads, shape->k_dim, shape->v_dim);
        return TQKV_ERR_UNSUPPORTED;
    }
    TQKV_TRY(tqkvi_layer_stats_init(&calib->layers[layer], &calib->mem, shape, w_o, n_out, parallel));
    calib->layers[layer].resident = resident;
    return TQKV_OK;
}

tqkv_status tqkv_calib_observe(tqkv_calib *calib, uint32_t layer, size_t n, const float *q, const float *k,
                               const float *v, const int32_t *positions, float scale, float softcap,
                               const tqkv_parallel *parallel)
{
    if (!calib || calib->draft || layer >= calib->n_layers || !calib->layers[layer].shape.n_kv_heads || !q || !k || !v ||
        !positions || n < TOKENS_MIN || n > TOKENS_MAX || !isfinite(scale))
        return TQKV_ERR_INVALID_ARG;
    for (size_t t = 0; t < n; t++)
        if (positions[t] < 0 || positions[t] != positions[0] + (int32_t)t)
            return TQKV_ERR_INVALID_ARG;
    const tqkvi_piece piece = {.n = n,
                               .q = q,
                               .k = k,
                               .v = v,
                               .positions = positions,
                               .scale = scale,
                               .softcap = softcap,
                               .frame_tokens = calib->frame_tokens,
                               .n_sinks = calib->n_sinks};

    return tqkvi_layer_stats_add(&calib->layers[layer], &calib->mem, &piece, parallel);
}

tqkv_status tqkv_calib_prepare(tqkv_calib *calib, const tqkv_parallel *parallel)
{
    if (!calib || calib->draft)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_calib_prepare(calib, parallel);
}

static bool is_group(const tqkv_calib *calib, uint32_t layer, tqkv_side side)
{
    return calib && calib->draft && layer < calib->n_layers && (unsigned)side <= TQKV_SIDE_V;
}

tqkv_status tqkv_calib_perturb(tqkv_calib *calib, uint32_t layer, tqkv_side side, float bits, size_t n,
                               const int32_t *positions, float *rows, double *distortion,
                               const tqkv_parallel *parallel)
{
    if (!is_group(calib, layer, side) || n == 0 || !positions || !rows || !distortion ||
        !(bits > 0.0F && bits <= 8.0F))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_calib_perturb(calib, layer, side, bits, n, positions, rows, distortion, parallel);
}

tqkv_status tqkv_calib_set_sensitivity(tqkv_calib *calib, uint32_t layer, tqkv_side side, double kl,
                                       double distortion)
{
    if (!is_group(calib, layer, side) || !(kl > 0.0 && isfinite(kl)) ||
        !(distortion > 0.0 && isfinite(distortion)))
        return TQKV_ERR_INVALID_ARG;
    calib->groups[side][layer].sensitivity = kl / distortion;
    return TQKV_OK;
}

void tqkv_profile_init(tqkv_profile *profile, const char *name, double bits_total, uint32_t context)
{
    static const struct {
        uint32_t tokens;
        float bits;
    } tiers[] = {{32, 8.0F}, {224, 6.0F}, {768, 4.0F}};

    *profile = (tqkv_profile){
        .struct_bytes = sizeof(*profile), .name = name ? name : "", .bits_total = bits_total, .context = context};
    for (size_t i = 0; i < sizeof(tiers) / sizeof(tiers[0]); i++)
        if ((double)tiers[i].bits > bits_total + 0.5) {
            profile->tier_tokens[profile->n_tiers] = tiers[i].tokens;
            profile->tier_bits[profile->n_tiers++] = tiers[i].bits;
        }
    profile->n_tiers++;
}

tqkv_status tqkv_calib_solve(tqkv_calib *calib, const tqkv_profile *profile, tqkv_plan **out)
{
    if (out)
        *out = NULL;
    if (!calib || !calib->draft || !profile || !out || profile->struct_bytes < sizeof(*profile) ||
        profile->n_tiers == 0 || profile->n_tiers > TQKV_TIERS_MAX || profile->context < 64 ||
        !(profile->bits_total > 0.0 && profile->bits_total <= 16.0))
        return TQKV_ERR_INVALID_ARG;
    for (uint32_t i = 0; i + 1 < profile->n_tiers; i++)
        if (profile->tier_tokens[i] == 0 || !(profile->tier_bits[i] > 0.0F && profile->tier_bits[i] <= 8.0F))
            return TQKV_ERR_INVALID_ARG;
    return tqkvi_calib_solve(calib, profile, out);
}
