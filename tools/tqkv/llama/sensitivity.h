/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much each layer matters. A probe is a piece of text that lies in an f16 cache. The old tokens
 * of one group, the K or the V of one layer, are made coarse in place, and the KL at the logits of
 * the tokens that follow is what the group costs. Then the rows are put back for the next group.
 * So near tokens are exact, as they nearly are when the plan is used, and the reach of attention
 * is that of a real context.
 */
#ifndef TQKV_SENSITIVITY_H
#define TQKV_SENSITIVITY_H

#include "host_llama.h"
#include "progress.h"
#include "text_pieces.h"
#include "turboquant/calib.h"
#include "workers.h"

enum { SENSITIVITY_OLD_TOKENS = 1024, SENSITIVITY_SCORED_TOKENS = 32 };

typedef struct sensitivity_job {
    host *h;
    workers *w;
    tqkv_calib *calib; /* prepared */
    const text_tokens *text;
    const tqkv_plan_layer *layers; /* [n_layers]; n_kv_heads 0: nothing to measure */
    uint32_t n_layers;
    uint32_t n_probes;
    double bits;   /* how coarse a group is made */
    progress *bar; /* from 0 to sensitivity_steps */
} sensitivity_job;

double sensitivity_steps(const sensitivity_job *job);

/*
 * Tells job->calib. kl: [n_layers][2] out, what each group costs above the floor.
 * Returns an exit code; says why it failed.
 */
int sensitivity_measure(const sensitivity_job *job, double *kl);

#endif /* TQKV_SENSITIVITY_H */
