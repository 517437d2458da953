/* SPDX-License-Identifier: Apache-2.0 */
/* What tqkv-bench is asked for, and its modes. */
#ifndef TQKV_BENCH_H
#define TQKV_BENCH_H

#include <jansson.h>

#include "in_turn.h"
#include "random_layer.h"
#include "spread.h"
#include "tool.h"

typedef struct bench_options {
    tqkv_plan_layer shape;
    uint32_t n_threads[8], depths[16];
    size_t n_thread_counts, n_depths;
    tool_list caches;   /* llama.cpp's */
    tool_list profiles; /* of plans for the random layer */
    const char *plan;   /* instead of profiles, or NULL */
    uint32_t plan_layer;
    uint32_t n_rounds;
    const char *json;
    FILE *out; /* of the tables */
} bench_options;

/* A plan of ours under test. */
typedef struct bench_plan {
    tqkv_plan *plan;
    uint32_t layer;
    char label[64]; /* "ours 5x" */
} bench_plan;

enum { BENCH_PLANS_MAX = 8, BENCH_CACHES_MAX = 16 };

/* One cache at one size. */
typedef struct bench_row {
    const char *mode, *cache;
    uint32_t depth, n_q, n_threads, n_layers;
    double bits;    /* per value, held; 0: nothing is */
    double error;   /* of the output, relative to llama.cpp's f16; -1: that was not run */
    spread seconds; /* of one layer */
    spread ratio;   /* how many times as fast as llama.cpp's f16; 0: that was not run */
    double bytes;   /* of one layer */
    double memory;  /* bytes per second that memory can be read with */
} bench_row;

/* Each prints what it measures and adds it to rows. Returns an exit code. */
int bench_attention(const bench_options *o, const random_layer *layer, const bench_plan *plans,
                    size_t n_plans, uint32_t n_q, json_t *rows);
int bench_encode(const bench_options *o, const random_layer *layer, const bench_plan *plans,
                 size_t n_plans, json_t *rows);

void bench_print_head(FILE *out, const bench_row *row);
void bench_print_row(FILE *out, const bench_row *row);
json_t *bench_row_json(const bench_row *row);
/* Processor, compiler and versions. */
json_t *bench_machine_json(void);

#endif /* TQKV_BENCH_H */
