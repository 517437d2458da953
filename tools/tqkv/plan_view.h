/* SPDX-License-Identifier: Apache-2.0 */
/* What commands ask of a plan: loading with a good message, sizes, whether it fits a model. */
#ifndef TQKV_PLAN_VIEW_H
#define TQKV_PLAN_VIEW_H

#include "gguf_head.h"
#include "turboquant/plan.h"

/* Returns an exit code; says why it failed. */
int plan_view_load(const char *path, tqkv_plan **out);

/* Whether layers, heads and dims are the model's; says what differs. Returns an exit code. */
int plan_view_check_model(const tqkv_plan *plan, const char *plan_path, const gguf_head *model,
                          const char *model_path);

/* Tokens that a layer holds when an engine has seen n_tokens: a sliding window keeps fewer. */
uint32_t plan_view_resident(uint32_t window, uint32_t n_tokens);

/* Bytes that one layer takes at n_tokens, everything counted, and the bytes of the same in f16. */
int plan_view_layer_bytes(const tqkv_plan *plan, uint32_t layer, uint32_t n_tokens, double *held,
                          double *f16);
/* Sums over all layers. */
int plan_view_bytes(const tqkv_plan *plan, uint32_t n_tokens, double *held, double *f16);

/* Mean bits per value of one head: codes and its share of the scale. */
double plan_view_head_bits(const tqkv_plan *plan, uint32_t layer, uint32_t head, tqkv_side side,
                           uint32_t tier);

/* Mean of the heads of one side; 0 in a layer without a cache. */
double plan_view_side_bits(const tqkv_plan *plan, uint32_t layer, tqkv_side side, uint32_t tier);

/*
 * The layer whose tiers matter for long contexts: the first that sees all tokens, since a sliding
 * one may have shorter tiers; where all slide, the last.
 */
void plan_view_long_layer(const tqkv_plan *plan, tqkv_plan_layer *out);

/* The fingerprint in hexadecimal. */
#define PLAN_VIEW_FINGERPRINT_CHARS (2 * TQKV_FINGERPRINT_BYTES + 1)
void plan_view_fingerprint(const tqkv_plan_info *info, char out[PLAN_VIEW_FINGERPRINT_CHARS]);

/* Where the plan of a model lies by default: beside it, .tqkv instead of .gguf. Given. */
char *plan_view_default_path(const char *model_path);

#endif /* TQKV_PLAN_VIEW_H */
