/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an engine does with one layer: make or load a plan, append tokens, attend, save, restore.
 *
 *     cc minimal_engine.c -lturboquant -lm -o minimal_engine && ./minimal_engine [model.tqkv]
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <turboquant/turboquant.h>

#define N_CELLS 4096
#define N_TOKENS 1000

static void check(tqkv_status status, const char *what)
{
    if (status == TQKV_OK)
        return;
    fprintf(stderr, "%s: %s\n", what, tqkv_status_text(status));
    exit(EXIT_FAILURE);
}

/* From calibration, or built in for a model that was never seen. */
static tqkv_plan *make_plan(const char *path)
{
    const tqkv_plan_layer shape = {.n_heads = 8, .n_kv_heads = 2, .k_dim = 128, .v_dim = 128};
    tqkv_plan *plan;
    if (path)
        check(tqkv_plan_load(path, NULL, &plan), path);
    else
        check(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), "plan");
    return plan;
}

/* Stands for a model: values of token t. */
static void model_rows(int t, size_t n, float *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = sinf((float)(t * 31 + (int)i * 17));
}

/* Exports K and V of a cell and imports them into another store, K first. */
static void move_cell(const tqkv_store *from, tqkv_store *to, int64_t cell)
{
    for (tqkv_side side = TQKV_SIDE_K; side <= TQKV_SIDE_V; side++) {
        uint8_t *record = malloc(tqkv_store_record_bytes(from, side));
        size_t n_bytes;
        check(tqkv_store_export(from, cell, side, record, &n_bytes), "export");
        check(tqkv_store_import(to, cell, side, record, n_bytes), "import");
        free(record);
    }
}

int main(int argc, char **argv)
{
    tqkv_plan *plan = make_plan(argc > 1 ? argv[1] : NULL);
    tqkv_plan_layer layer;
    check(tqkv_plan_get_layer(plan, 0, &layer), "layer");

    /* One store per layer; one batch serves all layers in turn. */
    tqkv_store_config config;
    tqkv_store_config_init(&config);
    config.plan = plan;
    config.n_cells = N_CELLS;
    tqkv_store *store, *restored;
    tqkv_batch *batch;
    check(tqkv_store_create(&config, &store), "store");
    check(tqkv_store_create(&config, &restored), "store");
    check(tqkv_batch_create(NULL, &batch), "batch");

    const size_t k_floats = layer.n_kv_heads * layer.k_dim;
    const size_t v_floats = layer.n_kv_heads * layer.v_dim;
    float *k = malloc(k_floats * sizeof(*k)), *v = malloc(v_floats * sizeof(*v));
    float *q = malloc(layer.n_heads * layer.k_dim * sizeof(*q));
    float *out = malloc(layer.n_heads * layer.v_dim * sizeof(*out));
    float *again = malloc(v_floats * sizeof(*again));
    const size_t scratch_bytes = tqkv_store_scratch_bytes(store, 1, 1);
    tqkv_attend_args args;
    tqkv_attend_args_init(&args);
    args.n_q = 1;
    args.q = q;
    args.q_head_stride = layer.k_dim;
    args.out = out;
    args.out_head_stride = layer.v_dim;
    args.scale = 1.0f / sqrtf((float)layer.k_dim);
    args.causal = 1;
    args.scratch = aligned_alloc(TQKV_ALIGN, (scratch_bytes / TQKV_ALIGN + 1) * TQKV_ALIGN);
    /* Decoding: stage the token, attend over it and all before, commit. */
    for (int32_t t = 0; t < N_TOKENS; t++) {
        const int64_t cell = t; /* any free cell; the position may be another number */
        model_rows(t, k_floats, k);
        model_rows(t + 1, v_floats, v);
        model_rows(t + 2, layer.n_heads * layer.k_dim, q);
        check(tqkv_batch_begin(batch, store, &cell, &t, 1), "begin");
        check(tqkv_batch_put(batch, TQKV_SIDE_K, k, k_floats), "put K");
        check(tqkv_batch_put(batch, TQKV_SIDE_V, v, v_floats), "put V");
        args.n_cells = (uint32_t)t + 1;
        check(tqkv_store_attend(store, batch, &args, NULL), "attend");
        check(tqkv_batch_commit(batch, NULL), "commit");
    }
    printf("out[0] = %g; %zu bytes, f16 would take %zu\n", (double)out[0], tqkv_store_bytes(store),
           N_TOKENS * (k_floats + v_floats) * 2);

    /* Save each cell as a record and restore it elsewhere: every code comes back. */
    for (int64_t cell = 0; cell < N_TOKENS; cell++)
        move_cell(store, restored, cell);
    check(tqkv_store_read(store, 7, TQKV_SIDE_V, v), "read");
    check(tqkv_store_read(restored, 7, TQKV_SIDE_V, again), "read");
    const int same = !memcmp(again, v, v_floats * sizeof(*v));
    printf("restored: %s\n", same ? "same" : "differs");

    float *const buffers[] = {k, v, q, out, again, args.scratch};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++)
        free(buffers[i]);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(restored);
    tqkv_store_destroy(store);
    tqkv_plan_destroy(plan);
    return same ? EXIT_SUCCESS : EXIT_FAILURE;
}
