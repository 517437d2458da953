/* SPDX-License-Identifier: Apache-2.0 */
#include "gate_report.h"

#include <math.h>

#include "json_file.h"
#include "plan_view.h"

/* The layer that the plan gives most bits, K and V together, in old tokens. */
static uint32_t richest_layer(const tqkv_plan *plan, const tqkv_plan_info *info, double *bits)
{
    uint32_t best = 0;
    *bits = 0;
    for (uint32_t i = 0; i < info->n_layers; i++) {
        tqkv_plan_layer shape;
        if (tqkv_plan_get_layer(plan, i, &shape) != TQKV_OK || !shape.n_kv_heads)
            continue;
        const uint32_t oldest = info->n_tiers - 1;
        const double k = plan_view_side_bits(plan, i, TQKV_SIDE_K, oldest) * shape.k_dim,
                     v = plan_view_side_bits(plan, i, TQKV_SIDE_V, oldest) * shape.v_dim,
                     mean = (k + v) / (shape.k_dim + shape.v_dim);
        best = mean > *bits ? i : best;
        *bits = mean > *bits ? mean : *bits;
    }
    return best;
}

void gate_report_print(const gate_plan *p, FILE *out)
{
    tqkv_plan_info info;
    double most;
    tqkv_plan_get_info(p->plan, &info);
    if (p->bits > p->asked_bits) {
        const uint32_t layer = richest_layer(p->plan, &info, &most);
        fprintf(out,
                "%s: asked for %s (%.2f bits): KL %.4f on held-back text is above %.4f; got %.2f "
                "bits (%.1fx), KL %.4f; most bits: layer %u (%.1f)\n",
                p->path, p->name, p->asked_bits, gate_loss(p, p->kl_first), p->limit,
                info.bits_total, 16 / info.bits_total, gate_loss(p, p->kl), layer, most);
    } else {
        fprintf(out, "%s: profile %s, %.3f bits per value at %u tokens", p->path, p->name,
                info.bits_total, info.context);
        if (p->n_checks)
            fprintf(out, ", KL %.4f on held-back text", gate_loss(p, p->kl));
        fputc('\n', out);
    }
    if (gate_is_exceeded(p))
        tool_note("warning: %s: with %.2f bits too KL on held-back text is %.4f, above %.4f; ask for "
                  "more bits, or say with --max-kl what is good enough",
                  p->path, info.bits_total, gate_loss(p, p->kl), p->limit);
}

json_t *gate_report_json(const gate_plan *p)
{
    const double unknown = p->n_checks ? 1 : (double)NAN;
    tqkv_plan_info info;
    tqkv_plan_get_info(p->plan, &info);
    return json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:I}", "path", p->path, "profile",
                     p->name, "bits", json_real_short(info.bits_total, 6), "asked_bits",
                     json_real_short(p->asked_bits, 6), "kl_held_out",
                     json_real_short(p->kl * unknown, 5), "kl_floor",
                     json_real_short(p->kl_floor * unknown, 5), "kl_limit",
                     json_real_short(p->limit * unknown, 5), "passes", (json_int_t)p->n_checks);
}
