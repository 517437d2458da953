/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives a calibration: shows the model text and hands what its attention sees to the library.
 *
 *     calib_run_observe   text in pieces, statistics of Q, K and V
 *     calib_run_prepare   transforms
 *     calib_run_perturb   old tokens of each layer's K and V made coarse alone, KL at the logits
 *     calib_run_solve     a plan for each profile; the host has no context any more
 */
#ifndef TQKV_CALIB_RUN_H
#define TQKV_CALIB_RUN_H

#include "gguf_head.h"
#include "host_llama.h"
#include "text_pieces.h"
#include "turboquant/calib.h"
#include "workers.h"

enum { CALIB_PIECE_TOKENS = 2048 };

typedef struct calib_options {
    const char *model_path; /* kept */
    uint32_t n_tokens;      /* to observe */
    uint32_t n_probes;      /* pieces that sensitivities are measured on */
    double probe_bits;
} calib_options;

typedef struct calib_run calib_run;

/* Returns an exit code; says why it failed. text: kept. */
int calib_run_create(host *h, workers *w, const gguf_head *model, const text_tokens *text,
                     const calib_options *options, calib_run **out);
void calib_run_destroy(calib_run *run);

/*
 * index, n_phases: for the progress lines. seconds: what the phase took.
 * Each returns an exit code.
 */
int calib_run_observe(calib_run *run, int index, int n_phases, double *seconds);
int calib_run_prepare(calib_run *run, int index, int n_phases, double *seconds);
int calib_run_perturb(calib_run *run, int index, int n_phases, double *seconds);
int calib_run_solve(calib_run *run, const tqkv_profile *profile, tqkv_plan **out);

/* Tokens that calib_run_observe shows. */
size_t calib_run_n_tokens(const calib_run *run);
/* KL of one group, [side] of a layer, after calib_run_perturb. */
double calib_run_kl(const calib_run *run, uint32_t layer, tqkv_side side);

#endif /* TQKV_CALIB_RUN_H */
