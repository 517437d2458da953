/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Modes `attention` (one token asks) and `prefill` (512 do): ours and llama.cpp's caches in turn, and threads that
 * read as many bytes as f16 has and do nothing else.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "bench_layers.h"
#include "read_loop.h"

/*
 * As many layers as make LEAST_BYTES of the narrowest cache, an eighth of f16, so that none of them lies in the
 * processor's caches, but no more than a model has. Prefill computes much longer than it reads.
 */
enum { LEAST_BYTES = 64 << 20, NARROWEST = 8, LAYERS_MAX = 32 };
static const double LEAST_SECONDS = 0.1;

typedef struct contender {
    bench_row row;
    our_layers *ours;
    stock_layers *stock;
    const float *output;
} contender;

typedef struct contest {
    bench_size size;
    contender contenders[BENCH_CACHES_MAX];
    in_turn subjects[BENCH_CACHES_MAX];
    size_t n;
    read_loop *loop; /* of the last contender */
} contest;

static double f16_bytes(const tqkv_plan_layer *shape, uint32_t n_tokens)
{
    return 2.0 * shape->n_kv_heads * (shape->k_dim + shape->v_dim) * n_tokens;
}

static uint32_t choose_layers(const tqkv_plan_layer *shape, uint32_t depth, uint32_t n_q)
{
    if (n_q > 1)
        return 1;
    const double n = ceil(LEAST_BYTES / (f16_bytes(shape, depth + n_q) / NARROWEST));
    return n < LAYERS_MAX ? (uint32_t)n : LAYERS_MAX;
}

static contender *add(contest *c, const char *label)
{
    contender *x = &c->contenders[c->n++];
    x->row = (bench_row){.cache = label,
                         .depth = c->size.depth,
                         .n_q = c->size.n_q,
                         .n_threads = c->size.n_threads,
                         .n_layers = c->size.n_layers};
    return x;
}

static int add_stock(contest *c, const random_layer *layer, const char *type)
{
    contender *x = add(c, type);
    const int rc = stock_layers_create(layer, type, &c->size, &x->stock);
    if (rc != TOOL_OK)
        return rc;
    c->subjects[c->n - 1] = (in_turn){.user = x->stock, .run = stock_layers_run};
    x->row.bytes = stock_layers_bytes(x->stock);
    x->output = stock_layers_output(x->stock);
    return TOOL_OK;
}

static int add_ours(contest *c, const random_layer *layer, const bench_plan *plan)
{
    contender *x = add(c, plan->label);
    const int rc = our_layers_create(layer, plan->plan, plan->layer, &c->size, &x->ours);
    if (rc != TOOL_OK)
        return rc;
    c->subjects[c->n - 1] = (in_turn){
        .user = x->ours, .begin = our_layers_begin, .run = our_layers_run, .end = our_layers_end};
    x->row.bytes = our_layers_bytes(x->ours);
    x->output = our_layers_output(x->ours);
    return TOOL_OK;
}

static const contender *find_f16(const contest *c)
{
    for (size_t i = 0; i < c->n; i++)
        if (strcmp(c->contenders[i].row.cache, "f16") == 0)
            return &c->contenders[i];
    return NULL;
}

/* Root of the squared difference over the squared size. */
static double error_of(const float *output, const float *want, size_t n)
{
    double size = 0, error = 0;
    for (size_t i = 0; i < n; i++) {
        const double difference = (double)output[i] - (double)want[i];
        size += (double)want[i] * (double)want[i];
        error += difference * difference;
    }
    return sqrt(error / size);
}

static void add_reading(contest *c, const random_layer *layer)
{
    contender *x = add(c, "reading f16");
    c->loop = read_loop_create(c->size.n_threads);
    c->subjects[c->n - 1] = (in_turn){
        .user = c->loop, .begin = read_loop_begin, .run = read_loop_run, .end = read_loop_end};
    x->row.bytes = f16_bytes(&layer->shape, c->size.depth + c->size.n_q);
}

/* Turns the rounds of the last contender into those of reading its layers. Returns bytes per second. */
static double scale_reading(contest *c, size_t n_rounds)
{
    double *seconds = c->subjects[c->n - 1].seconds, sorted[IN_TURN_ROUNDS_MAX];
    const double layers_bytes = c->contenders[c->n - 1].row.bytes * c->size.n_layers;
    memcpy(sorted, seconds, n_rounds * sizeof(*seconds));
    for (size_t round = 0; round < n_rounds; round++)
        seconds[round] *= layers_bytes / read_loop_bytes();
    return read_loop_bytes() / spread_of(sorted, n_rounds).median;
}

/* Before the rounds are sorted. */
static spread ratios(const contest *c, size_t i, size_t f16, size_t n_rounds)
{
    double values[IN_TURN_ROUNDS_MAX];
    for (size_t round = 0; round < n_rounds; round++)
        values[round] = c->subjects[f16].seconds[round] / c->subjects[i].seconds[round];
    return spread_of(values, n_rounds);
}

static void finish_rows(contest *c, const random_layer *layer, const char *mode, size_t n_rounds)
{
    const tqkv_plan_layer *shape = &layer->shape;
    const size_t n_output = (size_t)c->size.n_q * shape->n_heads * shape->v_dim;
    const contender *f16 = find_f16(c);
    const double memory = scale_reading(c, n_rounds);
    for (size_t i = 0; i < c->n; i++) {
        bench_row *row = &c->contenders[i].row;
        row->mode = mode;
        row->memory = memory;
        row->bits = c->size.depth && c->contenders[i].output
                        ? 16 * row->bytes / f16_bytes(shape, c->size.depth)
                        : 0;
        row->error = f16 && c->contenders[i].output
                         ? error_of(c->contenders[i].output, f16->output, n_output)
                         : -1;
        if (f16)
            row->ratio = ratios(c, i, (size_t)(f16 - c->contenders), n_rounds);
    }
    for (size_t i = 0; i < c->n; i++) {
        spread *s = &c->contenders[i].row.seconds;
        *s = spread_of(c->subjects[i].seconds, n_rounds);
        s->median /= c->size.n_layers;
        s->low /= c->size.n_layers;
        s->high /= c->size.n_layers;
    }
    for (size_t i = 0; i < c->n && f16; i++)
        c->contenders[i].row.ratio.median =
            f16->row.seconds.median / c->contenders[i].row.seconds.median;
}

static int run_contest(contest *c, const bench_options *o, const random_layer *layer,
                       const bench_plan *plans, size_t n_plans)
{
    if (n_plans + o->caches.n + 1 > BENCH_CACHES_MAX)
        return tool_usage("more than %d caches", BENCH_CACHES_MAX);
    int rc = TOOL_OK;
    for (size_t i = 0; i < o->caches.n && rc == TOOL_OK; i++)
        rc = add_stock(c, layer, o->caches.items[i]);
    for (size_t i = 0; i < n_plans && rc == TOOL_OK; i++)
        rc = add_ours(c, layer, &plans[i]);
    if (rc != TOOL_OK)
        return rc;
    add_reading(c, layer);
    in_turn_time(c->subjects, c->n, o->n_rounds, LEAST_SECONDS);
    return TOOL_OK;
}

static int measure(const bench_options *o, const random_layer *layer, const bench_plan *plans,
                   size_t n_plans, const bench_size *size, json_t *rows)
{
    contest *c = tool_alloc(1, sizeof(*c));
    c->size = *size;
    const int rc = run_contest(c, o, layer, plans, n_plans);
    if (rc == TOOL_OK) {
        finish_rows(c, layer, size->n_q > 1 ? "prefill" : "attention", o->n_rounds);
        bench_print_head(o->out, &c->contenders[0].row);
    }
    for (size_t i = 0; i < c->n; i++) {
        if (rc == TOOL_OK) {
            bench_print_row(o->out, &c->contenders[i].row);
            json_array_append_new(rows, bench_row_json(&c->contenders[i].row));
        }
        our_layers_destroy(c->contenders[i].ours);
        stock_layers_destroy(c->contenders[i].stock);
    }
    read_loop_destroy(c->loop);
    free(c);
    return rc;
}

int bench_attention(const bench_options *o, const random_layer *layer, const bench_plan *plans,
                    size_t n_plans, uint32_t n_q, json_t *rows)
{
    for (size_t i = 0; i < o->n_depths; i++) {
        for (size_t j = 0; j < o->n_thread_counts; j++) {
            const bench_size size = {.n_layers = choose_layers(&layer->shape, o->depths[i], n_q),
                                     .depth = o->depths[i],
                                     .n_q = n_q,
                                     .n_threads = o->n_threads[j]};
            const int rc = measure(o, layer, plans, n_plans, &size, rows);
            if (rc != TOOL_OK)
                return rc;
        }
    }
    return TOOL_OK;
}
