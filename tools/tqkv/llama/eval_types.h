/* SPDX-License-Identifier: Apache-2.0 */
/* What `tqkv eval` is asked for and what it finds. */
#ifndef TQKV_EVAL_TYPES_H
#define TQKV_EVAL_TYPES_H

#include "host_llama.h"
#include "spread.h"
#include "text_pieces.h"
#include "workers.h"

enum { EVAL_CACHES_MAX = 16, EVAL_SETTINGS_MAX = 16, EVAL_POSITIONS = 16, EVAL_DEPTHS_MAX = 16,
       EVAL_ROUNDS_MAX = 256 };

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
    uint32_t n_pieces; /* of each text */
    const char *phase; /* of the progress lines; NULL: named after the setting */
    int step, n_steps; /* for the progress lines */
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

typedef struct eval_speed_setting {
    uint32_t depths[EVAL_DEPTHS_MAX], n_threads[EVAL_DEPTHS_MAX]; /* depths ascend */
    size_t n_depths, n_thread_counts;
    uint32_t n_rounds;   /* of decoding; 0: as many as do not take long */
    bool has_prefill;    /* time it too */
    bool has_quick_fill; /* llama.cpp's caches are filled by copying what they hold */
} eval_speed_setting;

/* Tokens/s, over rounds. */
typedef struct eval_rate {
    spread rounds;
    size_t n_rounds; /* 0: not measured */
} eval_rate;

/* One cache at one depth with some threads. */
typedef struct eval_speed {
    const char *cache; /* its label */
    uint32_t depth, n_threads;
    eval_rate decode, prefill;
    double held_freed, rss_freed; /* bytes when the cache is emptied: claimed, by the process */
} eval_speed;

/* scores: [n_caches], zeroed; deinit them whatever comes back. Returns an exit code. */
int eval_score_run(eval_job *job, const eval_setting *setting, eval_score *scores);
void eval_score_deinit(eval_score *score);
/* Tokens of text that timing needs; 0 without depths. */
uint32_t eval_speed_tokens(const eval_speed_setting *setting);
/* speeds: [n_depths][n_thread_counts][n_caches], zeroed. */
int eval_speed_run(eval_job *job, const eval_speed_setting *setting, eval_speed *speeds);

#endif /* TQKV_EVAL_TYPES_H */
