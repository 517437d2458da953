/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mode `encode`: rows to codes on one core, in bytes of f16 per second. Single rows through the codec: side by side
 * the youngest and the oldest tier of every plan, which turn, transform and code; 8 bits without calibration, whose
 * transform is a Hadamard one; and f16, which codes only. Then whole batches through a store that is full, so that
 * every token that comes also ages others.
 */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "json_file.h"

enum { SUBJECTS_MAX = 64, STORE_TOKENS = 8192 };
static const double LEAST_SECONDS = 0.02;

typedef struct coder {
    char label[96];
    const random_layer *layer;
    tqkv_codec *codec; /* or else a store: */
    tqkv_side side;
    uint32_t tier;
    uint8_t *scales, *codes;
    tqkv_store *store;
    tqkv_batch *batch;
    uint32_t n_tokens, next_cell;
    double values; /* of one run */
} coder;

typedef struct encoders {
    coder coders[SUBJECTS_MAX];
    in_turn subjects[SUBJECTS_MAX];
    size_t n;
} encoders;

static void check(tqkv_status status)
{
    if (status)
        exit(tool_error("encoding: %s", tqkv_status_text(status)));
}

static uint32_t dim_of(const random_layer *layer, tqkv_side side)
{
    return side == TQKV_SIDE_K ? layer->shape.k_dim : layer->shape.v_dim;
}

static void encode_rows(void *user)
{
    const coder *x = user;
    const uint32_t n_heads = x->layer->shape.n_kv_heads, dim = dim_of(x->layer, x->side);
    for (uint32_t g = 0; g < n_heads; g++)
        check(tqkv_codec_encode(x->codec, g, x->side, x->tier, 0,
                                x->layer->rows[x->side] + (size_t)g * dim, (size_t)n_heads * dim,
                                RANDOM_TOKENS, x->scales, x->codes, NULL));
}

static void commit_batch(void *user)
{
    coder *x = user;
    int64_t cells[RANDOM_TOKENS];
    for (uint32_t t = 0; t < x->n_tokens; t++)
        cells[t] = (x->next_cell + t) % STORE_TOKENS;
    x->next_cell = (x->next_cell + x->n_tokens) % STORE_TOKENS;
    check(tqkv_batch_begin(x->batch, x->store, cells, NULL, x->n_tokens));
    for (int side = 0; side < 2; side++)
        check(
            tqkv_batch_put(x->batch, (tqkv_side)side, x->layer->rows[side],
                           (size_t)x->layer->shape.n_kv_heads * dim_of(x->layer, (tqkv_side)side)));
    check(tqkv_batch_commit(x->batch, NULL));
}

static coder *add(encoders *e, const random_layer *layer, void (*run)(void *user))
{
    if (e->n == SUBJECTS_MAX)
        exit(tool_usage("too many plans"));
    coder *x = &e->coders[e->n];
    x->layer = layer;
    e->subjects[e->n++] = (in_turn){.user = x, .run = run};
    return x;
}

static void add_rows(encoders *e, const random_layer *layer, const bench_plan *plan, tqkv_side side,
                     uint32_t tier)
{
    coder *x = add(e, layer, encode_rows);
    const uint32_t n_units = dim_of(layer, side) / TQKV_UNIT_CHANNELS;
    uint8_t bits[TQKV_UNITS_MAX];
    uint32_t sum = 0;
    size_t row_bytes = 0;
    check(tqkv_codec_create(plan->plan, plan->layer, NULL, NULL, &x->codec));
    for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++) {
        const size_t n = tqkv_codec_row_bytes(x->codec, g, side, tier);
        row_bytes = n > row_bytes ? n : row_bytes;
        check(tqkv_plan_get_bits(plan->plan, plan->layer, g, side, tier, bits));
        for (uint32_t i = 0; i < n_units; i++)
            sum += bits[i];
    }
    snprintf(x->label, sizeof(x->label), "%s, %c at %.2f bits", plan->label, "KV"[side],
             (double)sum / n_units / layer->shape.n_kv_heads);
    x->side = side;
    x->tier = tier;
    x->scales = random_layer_alloc(RANDOM_TOKENS);
    x->codes = random_layer_alloc(RANDOM_TOKENS * row_bytes);
    x->values = (double)RANDOM_TOKENS * layer->shape.n_kv_heads * dim_of(layer, side);
}

static void add_store(encoders *e, const random_layer *layer, const bench_plan *plan,
                      uint32_t n_tokens)
{
    coder *x = add(e, layer, commit_batch);
    tqkv_store_config config;
    tqkv_store_config_init(&config);
    config.plan = plan->plan;
    config.layer = plan->layer;
    config.n_cells = STORE_TOKENS;
    config.n_streams = 1;
    check(tqkv_store_create(&config, &x->store));
    check(tqkv_batch_create(NULL, &x->batch));
    x->n_tokens = RANDOM_TOKENS;
    for (uint32_t t = 0; t < STORE_TOKENS; t += RANDOM_TOKENS)
        commit_batch(x);
    x->n_tokens = n_tokens;
    x->values =
        (double)n_tokens * layer->shape.n_kv_heads * (layer->shape.k_dim + layer->shape.v_dim);
    snprintf(x->label, sizeof(x->label), "%s, store, %u token%s at a time", plan->label, n_tokens,
             n_tokens > 1 ? "s" : "");
}

static void add_plan(encoders *e, const random_layer *layer, const bench_plan *plan)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(plan->plan, &info);
    for (int side = 0; side < 2; side++) {
        add_rows(e, layer, plan, (tqkv_side)side, 0);
        if (info.n_tiers > 1)
            add_rows(e, layer, plan, (tqkv_side)side, info.n_tiers - 1);
    }
    add_store(e, layer, plan, RANDOM_TOKENS);
    add_store(e, layer, plan, 1);
}

static void report(FILE *out, encoders *e, size_t n_rounds, json_t *rows)
{
    fprintf(out, "\nencode on one core, GB of f16 per second\n%-40s %8s %18s\n", "", "median",
            "quartiles");
    for (size_t i = 0; i < e->n; i++) {
        const coder *x = &e->coders[i];
        const spread s = spread_of(e->subjects[i].seconds, n_rounds);
        const double bytes = 2 * x->values;
        fprintf(out, "%-40s %8.3f (%.3f..%.3f)\n", x->label, bytes / s.median / 1e9,
                bytes / s.high / 1e9, bytes / s.low / 1e9);
        json_array_append_new(
            rows, json_pack("{s:s, s:s, s:i, s:o, s:o, s:o}", "mode", "encode", "cache", x->label,
                            "threads", 1, "f16_bytes_per_s", json_real_short(bytes / s.median, 5),
                            "f16_bytes_per_s_low", json_real_short(bytes / s.high, 5),
                            "f16_bytes_per_s_high", json_real_short(bytes / s.low, 5)));
    }
}

static void deinit(encoders *e)
{
    for (size_t i = 0; i < e->n; i++) {
        coder *x = &e->coders[i];
        tqkv_codec_destroy(x->codec);
        tqkv_batch_destroy(x->batch);
        tqkv_store_destroy(x->store);
        free(x->scales);
        free(x->codes);
    }
    free(e);
}

int bench_encode(const bench_options *o, const random_layer *layer, const bench_plan *plans,
                 size_t n_plans, json_t *rows)
{
    encoders *e = tool_alloc(1, sizeof(*e));
    bench_plan builtin[] = {{.label = "8 bits, no plan"}, {.label = "f16, no plan"}};
    check(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &layer->shape, &builtin[0].plan));
    check(tqkv_plan_builtin(TQKV_BUILTIN_F16, &layer->shape, &builtin[1].plan));
    for (size_t i = 0; i < n_plans; i++)
        add_plan(e, layer, &plans[i]);
    for (size_t i = 0; i < 2; i++)
        add_plan(e, layer, &builtin[i]);
    in_turn_time(e->subjects, e->n, o->n_rounds, LEAST_SECONDS);
    report(o->out, e, o->n_rounds, rows);
    deinit(e);
    for (size_t i = 0; i < 2; i++)
        tqkv_plan_destroy(builtin[i].plan);
    return TOOL_OK;
}
