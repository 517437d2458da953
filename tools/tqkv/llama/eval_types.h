/* SPDX-License-Identifier: Apache-2.0 */
/* What `tqkv eval` is asked for and what it finds. */
#ifndef TQKV_EVAL_TYPES_H
#define TQKV_EVAL_TYPES_H

#include "host_llama.h"
#include "text_pieces.h"
#include "workers.h"

enum { EVAL_CACHES_MAX = 16, EVAL_SETTINGS_MAX = 16, EVAL_POSITIONS = 16 };

typedef struct eval_cache {
    char label[64];
    host_cache cache;
    double stock_bits; /* per value; 0: the plugin's, measured */
} eval_cache;

typedef struct eval_job {
    host *h;
    workers *w;
    bool has_stock_base; /* compare with llama.cpp's f16 cache instead of ours */
    eval_cache caches[EVAL_CACHES_MAX];
    size_t n_caches;
    text_tokens *texts;
    size_t n_texts;
    uint32_t n_pieces;   /* of each text */
    bool has_quick_fill; /* quantised caches of llama.cpp are filled by copying */
    const char *phase;   /* of the progress lines; NULL: named after the setting */
    int step, n_steps;   /* for the progress lines */
} eval_job;

typedef struct eval_setting {
    uint32_t n_ctx, n_ubatch;
} eval_setting;

/* What some of the scored tokens say. */
typedef struct eval_quality {
    size_t n; /* tokens scored */
    double kl_mean, kl_error, kl_median, kl_p999, top1;
    double kl_ci95; /* half the 95 % confidence interval of kl_mean; NAN: too few tokens */
    double ppl_base, ppl;
} eval_quality;

/* One cache at one setting. */
typedef struct eval_score {
    eval_quality all;
    eval_quality *texts;                         /* [n_texts] */
    eval_quality positions[EVAL_POSITIONS];      /* equal parts of the scored half */
    uint32_t first_position[EVAL_POSITIONS + 1]; /* in the piece, of each part; then the end */
    double held_bytes, f16_bytes;                /* of one full piece */
} eval_score;

/* One cache in the timed run. */
typedef struct eval_speed {
    uint32_t depth;
    double prefill;                           /* tokens/s; 0: filled by copying, not timed */
    double decode, decode_least, decode_most; /* tokens/s */
    double held_freed, rss_freed; /* bytes when the cache is emptied: claimed, by the process */
    double held_bytes;
} eval_speed;

/* scores: [n_caches], zeroed; deinit them whatever comes back. Returns an exit code. */
int eval_score_run(eval_job *job, const eval_setting *setting, eval_score *scores);
void eval_score_deinit(eval_score *score);
/* speeds: [n_caches]. */
int eval_speed_run(eval_job *job, uint32_t depth, eval_speed *speeds);

#endif /* TQKV_EVAL_TYPES_H */
