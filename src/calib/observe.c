/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Statistics of one layer from whole pieces of text. A task owns one KV head: it turns K into its
 * frames, adds the moments, then walks a sample of the queries of its group, computes their causal
 * attention exactly and adds the metric.
 */
#include "calib/observe.h"

#include <math.h>
#include <string.h>

#include "codec/layer_codec.h"

enum {
    QUERY_STRIDE = 8, /* every eighth query is looked at: 256 of a piece of 2048 */
    COLD_AGE = 64,    /* tokens; a younger key is read at 8 or 6 bits */
    ROWS = 16,        /* queries at a time */
    TOKENS = 64       /* tokens at a time */
};

/* ---- creation ------------------------------------------------------------------------------ */

static tqkv_status moments_init(tqkvi_moments *m, const tqkv_allocator *mem, size_t dim)
{
    m->shift = tqkvi_alloc_zero(mem, dim * sizeof(*m->shift));
    m->sum = tqkvi_alloc_zero(mem, dim * sizeof(*m->sum));
    m->outer = tqkvi_alloc_zero(mem, dim * dim * sizeof(*m->outer));
    m->metric = tqkvi_alloc_zero(mem, dim * dim * sizeof(*m->metric));
    return m->shift && m->sum && m->outer && m->metric ? TQKV_OK : TQKV_ERR_NO_MEMORY;
}

typedef struct gram_task {
    const float *w_o;
    float *gram;
    size_t n_out, n_heads, v_dim;
} gram_task;

static void gram_head(void *arg, size_t h, size_t worker)
{
    const gram_task *task = arg;
    const size_t d = task->v_dim, stride = task->n_heads * d;
    float *gram = task->gram + h * d * d;

    (void)worker;
    for (size_t r = 0; r < task->n_out; r++) {
        const float *w = task->w_o + r * stride + h * d;

        for (size_t i = 0; i < d; i++)
            for (size_t j = 0; j < d; j++)
                gram[i * d + j] += w[i] * w[j];
    }
}

tqkv_status tqkvi_layer_stats_init(tqkvi_layer_stats *stats, const tqkv_allocator *mem, const tqkv_plan_layer *shape,
                                   const float *w_o, size_t n_out, const tqkv_parallel *parallel)
{
    const size_t d = shape->v_dim, n_freq = shape->rope.n_rot / 2;
    gram_task task = {.w_o = w_o, .n_out = n_out, .n_heads = shape->n_heads, .v_dim = d};
    float *inv_freq;

    *stats = (tqkvi_layer_stats){.shape = *shape};
    memset(stats->shape.tier_tokens, 0, sizeof(stats->shape.tier_tokens));
    memset(stats->shape.token_bytes, 0, sizeof(stats->shape.token_bytes));
    inv_freq = tqkvi_alloc(mem, n_freq * sizeof(*inv_freq));
    stats->shape.rope.inv_freq = inv_freq;
    stats->gram = tqkvi_alloc_zero(mem, shape->n_heads * d * d * sizeof(*stats->gram));
    for (int side = 0; side < 2; side++)
        stats->heads[side] = tqkvi_alloc_zero(mem, shape->n_kv_heads * sizeof(*stats->heads[side]));
    if (!inv_freq || !stats->gram || !stats->heads[0] || !stats->heads[1])
        goto no_memory;
    if (n_freq)
        memcpy(inv_freq, shape->rope.inv_freq, n_freq * sizeof(*inv_freq));
    for (uint32_t g = 0; g < shape->n_kv_heads; g++)
        if (moments_init(&stats->heads[TQKV_SIDE_K][g], mem, shape->k_dim) ||
            moments_init(&stats->heads[TQKV_SIDE_V][g], mem, d))
            goto no_memory;

    task.gram = stats->gram;
    if (w_o)
        tqkvi_run(parallel, shape->n_heads, gram_head, &task);
    for (size_t h = 0; h < shape->n_heads && !w_o; h++)
        for (size_t i = 0; i < d; i++)
            stats->gram[(h * d + i) * d + i] = 1.0F;
    return TQKV_OK;

no_memory:
    tqkvi_layer_stats_deinit(stats, mem);
    return TQKV_ERR_NO_MEMORY;
}

void tqkvi_layer_stats_deinit(tqkvi_layer_stats *stats, const tqkv_allocator *mem)
{
    for (int side = 0; side < 2; side++) {
        for (uint32_t g = 0; stats->heads[side] && g < stats->shape.n_kv_heads; g++) {
            const tqkvi_moments *m = &stats->heads[side][g];

            tqkvi_free(mem, m->shift);
            tqkvi_free(mem, m->sum);
            tqkvi_free(mem, m->outer);
            tqkvi_free(mem, m->metric);
        }
        tqkvi_free(mem, stats->heads[side]);
    }
    tqkvi_free(mem, stats->gram);
    tqkvi_free(mem, (void *)(uintptr_t)stats->shape.rope.inv_freq);
    *stats = (tqkvi_layer_stats){0};
}

/* ---- one piece ----------------------------------------------------------------------------- */

typedef struct add_task {
    tqkvi_layer_stats *stats;
    const tqkvi_piece *piece;
    const tqkvk_table *kernels;
    const float *turns; /* [n_frames][n_rot] cos then sin of each frame's base */
    int32_t first_base;
    size_t scratch_floats;
    float *scratch; /* [n_kv_heads][scratch_floats] */
} add_task;

/* Arrays of one task, cut from its scratch. */
typedef struct head_work {
    float *k;      /* [n_pad][k_dim] as given: scores */
    float *u;      /* [n_pad][v_dim] R v_t with R'R = gram of the query head */
    float *u_norm; /* [n_pad] |u_t|^2 */
    float *v;      /* [n_pad][v_dim] */
    float *q;      /* [ROWS][k_dim] */
    float *q_latent; /* [ROWS][v_dim] in a latent layer */
    float *s;      /* [ROWS][n_pad] scores, then probabilities */
    float *du;     /* [ROWS][n_pad] u_t . u_o */
    float *o;      /* [ROWS][v_dim] */
    float *uo;     /* [ROWS][v_dim] */
    float *root;   /* [v_dim][v_dim] R transposed: u[j] = sum_i root[i * v_dim + j] v[i] */
    float *xt;     /* [dim_max][TOKENS] */
    float *outer;  /* [dim_max][dim_max] */
    float *ones;   /* [dim_max] */
    size_t n_pad;
} head_work;

static size_t work_cut(head_work *w, float *base, const tqkv_plan_layer *shape, size_t n)
{
    const size_t dk = shape->k_dim, dv = shape->v_dim, d = dk > dv ? dk : dv;
    const size_t n_pad = (n + TOKENS - 1) / TOKENS * TOKENS;
    const size_t sizes[] = {n_pad * dk,   n_pad * dv, n_pad,     n_pad * dv, ROWS * dk,  ROWS * dv, ROWS * n_pad,
                            ROWS * n_pad, ROWS * dv,  ROWS * dv, dv * dv,    d * TOKENS, d * d,     d};
    float **fields[] = {&w->k, &w->u, &w->u_norm, &w->v,    &w->q,  &w->q_latent, &w->s,
                        &w->du, &w->o, &w->uo,    &w->root, &w->xt, &w->outer,    &w->ones};
    size_t used = 0;

    w->n_pad = n_pad;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (base)
            *fields[i] = base + used;
        used += (sizes[i] + 31) / 16 * 16; /* aligned, with a vector of slack */
    }
    return used;
}

static const float *frame_turn(const add_task *task, int32_t position)
{
    const int32_t base = tqkvi_frame_base(position, task->piece->frame_tokens);
    const size_t frame = (size_t)(base - task->first_base) / task->piece->frame_tokens;

    return task->turns + frame * task->stats->shape.rope.n_rot;
}

/* Adds x - shift of tokens [n_sinks, n) to the moments; rows: [n_pad][dim], overwritten by x - shift. */
static void add_moments(const add_task *task, tqkvi_moments *m, head_work *w, float *rows, size_t dim)
{
    const size_t n = task->piece->n, skip = n > task->piece->n_sinks ? task->piece->n_sinks : 0;

    if (m->n == 0) {
        for (size_t t = skip; t < n; t++)
            for (size_t i = 0; i < dim; i++)
                m->shift[i] += rows[t * dim + i] / (float)(n - skip);
    }
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < dim; i++) {
            float *x = &rows[t * dim + i];

            *x = t < skip ? 0.0F : *x - m->shift[i];
            m->sum[i] += (double)*x;
        }
    memset(rows + n * dim, 0, (w->n_pad - n) * dim * sizeof(*rows));
    for (size_t i = 0; i < dim; i++)
        w->ones[i] = 1.0F;
    memset(w->outer, 0, dim * dim * sizeof(*w->outer));
    for (size_t t = 0; t < w->n_pad; t += TOKENS) {
        for (size_t b = 0; b < TOKENS; b++)
            for (size_t i = 0; i < dim; i++)
                w->xt[i * TOKENS + b] = rows[(t + b) * dim + i];
        task->kernels->accumulate_tile(w->xt, TOKENS, dim, rows + t * dim, TOKENS, dim, w->ones, w->outer);
    }
    for (size_t i = 0; i < dim * dim; i++)
        m->outer[i] += (double)w->outer[i];
    m->n += n - skip;
}

/* R with R'R = gram, by Cholesky; a gram that is not quite positive loses the direction. */
static void gram_root(const float *gram, size_t d, float *root)
{
    memset(root, 0, d * d * sizeof(*root));
    /* root holds L (gram = L L') so that u = L' v: u[j] = sum_i L[i][j] v[i] */
    for (size_t j = 0; j < d; j++)
        for (size_t i = j; i < d; i++) {
            double sum = (double)gram[i * d + j];

            for (size_t k = 0; k < j; k++)
                sum -= (double)root[i * d + k] * (double)root[j * d + k];
            if (i == j)
                root[j * d + j] = sum > 0.0 ? (float)sqrt(sum) : 0.0F;
            else
                root[i * d + j] = root[j * d + j] > 0.0F ? (float)(sum / (double)root[j * d + j]) : 0.0F;
        }
}

/* Probabilities of the queries in w->q at tokens at[0..n_rows): exact causal attention, and its output. */
static void attend_rows(const add_task *task, head_work *w, const size_t *at, size_t n_rows)
{
    const tqkvi_piece *piece = task->piece;
    const tqkv_plan_layer *shape = &task->stats->shape;
    const float zero[ROWS] = {0};

    task->kernels->dot_tile(w->q, n_rows, w->k, w->n_pad, shape->k_dim, w->s, w->n_pad);
    if (shape->is_latent) {
        task->kernels->dot_tile(w->q_latent, n_rows, w->v, w->n_pad, shape->v_dim, w->du, w->n_pad);
        for (size_t i = 0; i < n_rows * w->n_pad; i++)
            w->s[i] += w->du[i];
    }
    for (size_t r = 0; r < n_rows; r++) {
        float *s = w->s + r * w->n_pad;
        const size_t first = shape->window && at[r] >= shape->window ? at[r] - shape->window + 1 : 0;
        float max = -INFINITY, sum = 0.0F;

        for (size_t t = 0; t < w->n_pad; t++) {
            s[t] *= piece->scale;
            if (piece->softcap > 0.0F)
                s[t] = piece->softcap * tanhf(s[t] / piece->softcap);
            if (t > at[r] || t < first)
                s[t] = -INFINITY;
        }
        task->kernels->softmax_step(s, w->n_pad, &max, &sum);
        for (size_t t = 0; t < w->n_pad; t++)
            s[t] /= sum;
    }
    memset(w->o, 0, n_rows * shape->v_dim * sizeof(*w->o));
    task->kernels->accumulate_tile(w->s, w->n_pad, n_rows, w->v, w->n_pad, shape->v_dim, zero, w->o);
}

/* Adds weight * q q' for the query turned into the frame. */
static void add_outer(const tqkv_rope *rope, const float *turn, const float *q, size_t dim, double weight,
                      double *metric)
{
    float local[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS];

    memcpy(local, q, dim * sizeof(*local));
    if (rope->n_rot)
        tqkvi_turn_apply(rope, turn, turn + rope->n_rot / 2, true, local);
    for (size_t i = 0; i < dim; i++) {
        const double wi = weight * (double)local[i];

        for (size_t j = 0; j < dim; j++)
            metric[i * dim + j] += wi * (double)local[j];
    }
}

/*
 * Metric of one query (row r, token at): frame by frame the weight of q q', in a latent layer also of the
 * query's other part; returns the sum of p^2.
 */
static double add_query(const add_task *task, head_work *w, size_t r, size_t at, double *metric, double *metric_v)
{
    static const tqkv_rope no_turn = {.style = TQKV_ROPE_NONE};
    const tqkvi_piece *piece = task->piece;
    const size_t dk = task->stats->shape.k_dim, dv = task->stats->shape.v_dim;
    const float *p = w->s + r * w->n_pad, *du = w->du + r * w->n_pad, *uo = w->uo + r * task->stats->shape.v_dim;
    const size_t end = at > COLD_AGE ? at - COLD_AGE : 0;
    double uo_norm = 0.0, p2_sum = 0.0, weight = 0.0, weight_sum = 0.0;

    for (size_t i = 0; i < task->stats->shape.v_dim; i++)
        uo_norm += (double)uo[i] * (double)uo[i];
    for (size_t t = piece->n_sinks; t < end; t++) {
        const double p2 = (double)p[t] * (double)p[t];
        const double dist = (double)w->u_norm[t] - 2.0 * (double)du[t] + uo_norm;

        weight += p2 * (dist > 0.0 ? dist : 0.0);
        p2_sum += p2;
        if (t + 1 == end || tqkvi_frame_base(piece->positions[t + 1], piece->frame_tokens) !=
                                tqkvi_frame_base(piece->positions[t], piece->frame_tokens)) {
            if (weight > 0.0)
                add_outer(&task->stats->shape.rope, frame_turn(task, piece->positions[t]), w->q + r * dk, dk, weight,
                          metric);
            weight_sum += weight;
            weight = 0.0;
        }
    }
    if (task->stats->shape.is_latent && weight_sum > 0.0)
        add_outer(&no_turn, NULL, w->q_latent + r * dv, dv,
                  (double)piece->scale * (double)piece->scale * weight_sum, metric_v);
    return p2_sum;
}

static void add_metric(const add_task *task, head_work *w, size_t g, size_t h)
{
    const tqkvi_piece *piece = task->piece;
    const tqkv_plan_layer *shape = &task->stats->shape;
    const size_t dk = shape->k_dim, dv = shape->v_dim, dq = shape->is_latent ? dk + dv : dk;
    const float *gram = task->stats->gram + h * dv * dv;
    double *metric_v = task->stats->heads[TQKV_SIDE_V][g].metric;
    double p2 = 0.0;
    size_t at[ROWS];

    gram_root(gram, dv, w->root);
    for (size_t t = 0; t < w->n_pad; t++) {
        float *u = w->u + t * dv;

        task->kernels->transform(w->root, w->v + t * dv, u, dv, 1);
        w->u_norm[t] = 0.0F;
        for (size_t i = 0; i < dv; i++)
            w->u_norm[t] += u[i] * u[i];
    }
    for (size_t i = COLD_AGE; i < piece->n;) {
        size_t n_rows = 0;

        for (; i < piece->n && n_rows < ROWS; i += QUERY_STRIDE, n_rows++) {
            const float *q = piece->q + (i * shape->n_heads + h) * dq;

            at[n_rows] = i;
            memcpy(w->q + n_rows * dk, q, dk * sizeof(*w->q));
            memcpy(w->q_latent + n_rows * dv, q + dk, (dq - dk) * sizeof(*w->q));
        }
        attend_rows(task, w, at, n_rows);
        task->kernels->transform(w->root, w->o, w->uo, dv, n_rows);
        task->kernels->dot_tile(w->uo, n_rows, w->u, w->n_pad, dv, w->du, w->n_pad);
        for (size_t r = 0; r < n_rows; r++)
            p2 += add_query(task, w, r, at[r], task->stats->heads[TQKV_SIDE_K][g].metric, metric_v);
    }
    for (size_t i = 0; i < dv * dv; i++)
        metric_v[i] += p2 * (double)gram[i];
}

static void add_head(void *arg, size_t g, size_t worker)
{
    const add_task *task = arg;
    const tqkvi_piece *piece = task->piece;
    const tqkv_plan_layer *shape = &task->stats->shape;
    const size_t dk = shape->k_dim, dv = shape->v_dim, group = shape->n_heads / shape->n_kv_heads;
    head_work w;

    (void)worker;
    work_cut(&w, task->scratch + g * task->scratch_floats, shape, piece->n);
    memset(w.k, 0, w.n_pad * dk * sizeof(*w.k));
    memset(w.v, 0, w.n_pad * dv * sizeof(*w.v));
    for (size_t t = 0; t < piece->n; t++) {
        memcpy(w.k + t * dk, piece->k + (t * shape->n_kv_heads + g) * dk, dk * sizeof(*w.k));
        memcpy(w.v + t * dv, piece->v + (t * shape->n_kv_heads + g) * dv, dv * sizeof(*w.v));
    }
    for (size_t h = g * group; h < (g + 1) * group; h++)
        add_metric(task, &w, g, h);
    for (size_t t = 0; t < piece->n && shape->rope.n_rot; t++) {
        const float *turn = frame_turn(task, piece->positions[t]);

        tqkvi_turn_apply(&shape->rope, turn, turn + shape->rope.n_rot / 2, true, w.k + t * dk);
    }
    add_moments(task, &task->stats->heads[TQKV_SIDE_K][g], &w, w.k, dk);
    add_moments(task, &task->stats->heads[TQKV_SIDE_V][g], &w, w.v, dv);
}

tqkv_status tqkvi_layer_stats_add(tqkvi_layer_stats *stats, const tqkv_allocator *mem, const tqkvi_piece *piece,
                                  const tqkv_parallel *parallel)
{
    const tqkv_plan_layer *shape = &stats->shape;
    const size_t n_rot = shape->rope.n_rot;
    add_task task = {.stats = stats, .piece = piece, .kernels = tqkvk_get()};
    size_t n_frames, floats;
    float *turns = NULL;
    head_work sizes;
    tqkv_status status = TQKV_ERR_NO_MEMORY;

    task.first_base = tqkvi_frame_base(piece->positions[0], piece->frame_tokens);
    n_frames = (size_t)(piece->positions[piece->n - 1] - task.first_base) / piece->frame_tokens + 1;
    task.scratch_floats = work_cut(&sizes, NULL, shape, piece->n);
    TQKV_TRY(tqkvi_size_mul(task.scratch_floats, shape->n_kv_heads * sizeof(float), &floats));
    task.scratch = tqkvi_alloc(mem, floats);
    turns = tqkvi_alloc(mem, n_frames * n_rot * sizeof(*turns));
    if (task.scratch && turns) {
        for (size_t f = 0; f < n_frames && n_rot; f++)
            tqkvi_turn_init(&shape->rope, task.first_base + (int32_t)(f * piece->frame_tokens), turns + f * n_rot,
                            turns + f * n_rot + n_rot / 2);
        task.turns = turns;
        tqkvi_run(parallel, shape->n_kv_heads, add_head, &task);
        status = TQKV_OK;
    }
    tqkvi_free(mem, turns);
    tqkvi_free(mem, task.scratch);
    return status;
}
