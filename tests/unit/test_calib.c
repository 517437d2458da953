/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calibration on synthetic models whose right answer is known: eigenvectors, allocation, moments in
 * the RoPE frame, whitening by the transform, determinism and every error return.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "calib/allocate.h"
#include "calib/calibration.h"
#include "calib/eigen.h"
#include "turboquant/store.h"

enum { N_LAYERS = 2, N_HEADS = 4, N_KV = 2, DIM = 32, N_TOKENS = 512 };

static uint64_t state;

static double uniform(void)
{
    state = state * 6364136223846793005U + 1442695040888963407U;
    return (double)(state >> 11) / 9007199254740992.0;
}

static float gauss(void)
{
    return (float)(sqrt(-2.0 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform()));
}

static void eigenvectors_reproduce_the_matrix(void **unused)
{
    (void)unused;
    for (size_t n = 1; n <= 96; n += n < 5 ? 1 : 13) {
        double *s = malloc(n * n * sizeof(*s)), *a = malloc(n * n * sizeof(*a));
        double values[96], work[96];

        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j <= i; j++)
                s[i * n + j] = s[j * n + i] = i == j ? 10.0 * uniform() : uniform() - 0.5;
        memcpy(a, s, n * n * sizeof(*a));
        assert_true(tqkvi_eigen_symmetric(a, n, values, work));
        for (size_t e = 0; e < n; e++) {
            assert_true(e == 0 || values[e] <= values[e - 1]);
            for (size_t i = 0; i < n; i++) {
                double product = 0.0;

                for (size_t j = 0; j < n; j++)
                    product += s[i * n + j] * a[e * n + j];
                assert_true(fabs(product - values[e] * a[e * n + i]) < 1e-13 * (double)n * 20.0);
            }
        }
        free(a);
        free(s);
    }
}

/* Rows of 512 channels that only 9 directions make, sizes over eight decades: the rest is rounding. */
static void eigenvectors_of_few_directions(void **unused)
{
    enum { N = 512, RANK = 9 };
    double *s = calloc(N * N, sizeof(*s)), *a = malloc(N * N * sizeof(*a));
    double x[N], values[N], work[N], trace = 0.0, sum = 0.0;

    (void)unused;
    for (int r = 0; r < RANK; r++) {
        for (size_t i = 0; i < N; i++)
            x[i] = (double)gauss() * pow(10.0, -r);
        for (size_t i = 0; i < N; i++)
            for (size_t j = 0; j < N; j++)
                s[i * N + j] += x[i] * x[j];
    }
    memcpy(a, s, N * N * sizeof(*a));
    assert_true(tqkvi_eigen_symmetric(a, N, values, work));
    for (size_t i = 0; i < N; i++) {
        trace += s[i * N + i];
        sum += values[i];
        assert_true(i < RANK || fabs(values[i]) < 1e-13 * values[0]);
    }
    assert_true(fabs(trace - sum) < 1e-12 * trace);
    free(a);
    free(s);
}

static void eigenvectors_refuse_nan(void **unused)
{
    double a[4] = {1.0, NAN, NAN, 1.0}, values[2], work[2];

    (void)unused;
    assert_false(tqkvi_eigen_symmetric(a, 2, values, work));
}

static void allocation_spends_the_budget_where_it_helps(void **unused)
{
    tqkvi_band bands[3] = {{.loss = 1.0, .price = 2.0}, {.loss = 100.0, .price = 2.0}, {.loss = 0.0, .price = 2.0}};

    (void)unused;
    assert_true(tqkvi_allocate(bands, 3, 8, 16.0) <= 16.0);
    assert_true(bands[1].bits > bands[0].bits);
    assert_int_equal(bands[0].bits + bands[1].bits, 8);
    assert_int_equal(bands[2].bits, 0); /* nothing to win there */
    assert_true(tqkvi_allocate(bands, 2, 8, 1e9) > 0.0);
    assert_int_equal(bands[0].bits, 8); /* 7 is stepped over */
}

/* Text of a made-up model: K has a strong mean and one strong direction, both rotated by RoPE. */
typedef struct sample {
    float q[N_TOKENS * N_HEADS * DIM], k[N_TOKENS * N_KV * DIM], v[N_TOKENS * N_KV * DIM];
    int32_t positions[N_TOKENS];
    float inv_freq[DIM / 2];
    tqkv_plan_layer shape;
    uint32_t window; /* of the last layer */
    float w_o[DIM * N_HEADS * DIM];
} sample;

static void sample_make(sample *s, uint64_t seed)
{
    float turned[DIM], cosine[DIM / 2], sine[DIM / 2];

    state = seed;
    s->window = 0;
    for (size_t i = 0; i < DIM / 2; i++)
        s->inv_freq[i] = powf(1000.0F, -(float)i / (DIM / 2.0F));
    s->shape = (tqkv_plan_layer){.n_heads = N_HEADS,
                                 .n_kv_heads = N_KV,
                                 .k_dim = DIM,
                                 .v_dim = DIM,
                                 .rope = {TQKV_ROPE_HALVES, DIM, s->inv_freq}};
    for (size_t i = 0; i < sizeof(s->w_o) / sizeof(*s->w_o); i++)
        s->w_o[i] = gauss();
    for (size_t t = 0; t < N_TOKENS; t++) {
        s->positions[t] = (int32_t)t;
        tqkvi_turn_init(&s->shape.rope, (int32_t)t, cosine, sine);
        for (size_t h = 0; h < N_HEADS; h++)
            for (size_t i = 0; i < DIM; i++)
                s->q[(t * N_HEADS + h) * DIM + i] = gauss();
        for (size_t g = 0; g < N_KV; g++) {
            for (size_t i = 0; i < DIM; i++) {
                turned[i] = gauss() * (i == 3 ? 4.0F : 0.5F) + (i == 15 ? 100.0F : 0.0F);
                s->v[(t * N_KV + g) * DIM + i] = gauss() + (float)i;
            }
            tqkvi_turn_apply(&s->shape.rope, cosine, sine, false, turned);
            memcpy(&s->k[(t * N_KV + g) * DIM], turned, sizeof(turned));
        }
    }
}

static tqkv_calib *make_calib(const sample *s, const tqkv_allocator *mem, tqkv_status *status)
{
    tqkv_calib_config config;
    tqkv_calib *calib;

    tqkv_calib_config_init(&config);
    config.model = "made-up";
    config.arch = "none";
    config.n_layers = N_LAYERS;
    config.frame_tokens = 128;
    config.mem = mem;
    *status = tqkv_calib_create(&config, &calib);
    for (uint32_t l = 0; l < N_LAYERS && *status == TQKV_OK; l++) {
        tqkv_plan_layer shape = s->shape;

        shape.window = l + 1 == N_LAYERS ? s->window : 0;
        *status = tqkv_calib_set_layer(calib, l, &shape, s->w_o, DIM, 2 * shape.window, NULL);
    }
    for (uint32_t l = 0; l < N_LAYERS && *status == TQKV_OK; l++)
        *status = tqkv_calib_observe(calib, l, N_TOKENS, s->q, s->k, s->v, s->positions, 0.18F, 0.0F, NULL);
    if (*status == TQKV_OK)
        *status = tqkv_calib_prepare(calib, NULL);
    return calib;
}

static tqkv_plan *make_plan(const sample *s, double bits, const tqkv_parallel *parallel)
{
    tqkv_profile profile;
    tqkv_status status;
    tqkv_calib *calib = make_calib(s, NULL, &status);
    tqkv_plan *plan;
    float *rows = malloc(sizeof(s->k));
    double distortion = 0.0;

    assert_int_equal(status, TQKV_OK);
    for (uint32_t l = 0; l < N_LAYERS; l++)
        for (int side = 0; side < 2; side++) {
            memcpy(rows, side ? s->v : s->k, sizeof(s->k));
            assert_int_equal(tqkv_calib_perturb(calib, l, (tqkv_side)side, 2.0F, N_TOKENS, s->positions, rows, &distortion,
                                                parallel),
                             TQKV_OK);
            assert_true(distortion > 0.0);
            assert_int_equal(tqkv_calib_set_sensitivity(calib, l, (tqkv_side)side, l == 0 ? 1.0 : 0.1, distortion),
                             TQKV_OK);
        }
    tqkv_profile_init(&profile, "test", bits, 8192);
    assert_int_equal(tqkv_calib_solve(calib, &profile, &plan), TQKV_OK);
    free(rows);
    tqkv_calib_destroy(calib);
    return plan;
}

static void transform_whitens_rows_in_their_frame(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_status status;
    tqkv_calib *calib;
    double sum[2] = {0}, square[2] = {0};
    _Alignas(TQKV_ALIGN) float y[DIM + 16], x[DIM + 16]; /* with the slack that kernels may read */
    float cosine[DIM / 2], sine[DIM / 2];

    (void)unused;
    sample_make(s, 7);
    calib = make_calib(s, NULL, &status);
    assert_int_equal(status, TQKV_OK);
    for (size_t t = 4; t < N_TOKENS; t++) {
        const tqkvi_head_plan *head = &calib->draft->layers[0].heads[TQKV_SIDE_K][1];

        tqkvi_turn_init(&s->shape.rope, (int32_t)t / 128 * 128, cosine, sine);
        memcpy(x, &s->k[(t * N_KV + 1) * DIM], DIM * sizeof(*x));
        tqkvi_turn_apply(&s->shape.rope, cosine, sine, true, x);
        for (size_t i = 0; i < DIM; i++)
            x[i] -= head->mean[i];
        tqkvk_get()->transform(head->transform, x, y, DIM, 1);
        for (size_t i = 0; i < DIM; i++) {
            sum[i / 16] += (double)y[i];
            square[i / 16] += (double)y[i] * (double)y[i];
        }
    }
    for (size_t band = 0; band < 2; band++) {
        const double n = (N_TOKENS - 4) * 16.0;

        assert_true(fabs(sum[band] / n) < 0.01);
        assert_true(fabs(square[band] / n - 1.0) < 0.02);
    }
    tqkv_calib_destroy(calib);
    free(s);
}

/* A latent layer of one frame. */
enum { LATENT_HEADS = 3, TURNED = 16, LATENT = 32, LATENT_TOKENS = 120, LATENT_QUERY = TURNED + LATENT };

typedef struct latent_sample {
    float q[LATENT_TOKENS * LATENT_HEADS * LATENT_QUERY], k[LATENT_TOKENS * TURNED], v[LATENT_TOKENS * LATENT];
    float w_o[DIM * LATENT_HEADS * LATENT];
    int32_t positions[LATENT_TOKENS];
} latent_sample;

/* |W_o x|^2 of a head. */
static double seen_size(const float *w_o, size_t h, const double *x)
{
    double size = 0.0;

    for (size_t r = 0; r < DIM; r++) {
        double sum = 0.0;

        for (size_t i = 0; i < LATENT; i++)
            sum += (double)w_o[(r * LATENT_HEADS + h) * LATENT + i] * x[i];
        size += sum * sum;
    }
    return size;
}

/* Adds what query `at` of head h reads of cold tokens to x' M x of both sides, straight from observe.h. */
static void add_query_sizes(const latent_sample *s, size_t h, size_t at, double scale, const double *x, double *size_k,
                            double *size_v)
{
    const float *q = s->q + (at * LATENT_HEADS + h) * LATENT_QUERY;
    double p[LATENT_TOKENS], sum = 0.0, o[LATENT] = {0}, d[LATENT], q_x[2] = {0};

    for (size_t t = 0; t <= at; t++) {
        double score = 0.0;

        for (size_t i = 0; i < LATENT_QUERY; i++)
            score += (double)q[i] * (double)(i < TURNED ? s->k[t * TURNED + i] : s->v[t * LATENT + i - TURNED]);
        p[t] = exp(scale * score);
        sum += p[t];
    }
    for (size_t t = 0; t <= at; t++)
        for (size_t i = 0; i < LATENT; i++)
            o[i] += p[t] / sum * (double)s->v[t * LATENT + i];
    for (size_t i = 0; i < LATENT; i++) {
        q_x[0] += i < TURNED ? (double)q[i] * x[i] : 0.0;
        q_x[1] += (double)q[TURNED + i] * x[i];
    }
    for (size_t t = 4; t + 64 < at; t++) {
        const double p2 = p[t] / sum * (p[t] / sum);

        for (size_t i = 0; i < LATENT; i++)
            d[i] = (double)s->v[t * LATENT + i] - o[i];
        *size_k += p2 * seen_size(s->w_o, h, d) * q_x[0] * q_x[0];
        *size_v += p2 * (seen_size(s->w_o, h, x) + scale * scale * seen_size(s->w_o, h, d) * q_x[1] * q_x[1]);
    }
}

static double form(const double *m, const double *x, size_t dim)
{
    double sum = 0.0;

    for (size_t i = 0; i < dim; i++)
        for (size_t j = 0; j < dim; j++)
            sum += x[i] * m[i * dim + j] * x[j];
    return sum;
}

static void latents_are_weighed_as_keys_and_values(void **unused)
{
    static latent_sample s;
    const float inv_freq[TURNED / 2] = {1.0F, 0.5F}, scale = 0.2F;
    const tqkv_plan_layer shape = {.n_heads = LATENT_HEADS,
                                   .n_kv_heads = 1,
                                   .k_dim = TURNED,
                                   .v_dim = LATENT,
                                   .rope = {TQKV_ROPE_PAIRS, TURNED, inv_freq},
                                   .is_latent = 1};
    const struct {
        float *values;
        size_t n;
    } arrays[] = {{s.q, sizeof(s.q) / 4}, {s.k, sizeof(s.k) / 4}, {s.v, sizeof(s.v) / 4}, {s.w_o, sizeof(s.w_o) / 4}};
    tqkv_calib_config config;
    tqkv_calib *calib;

    (void)unused;
    state = 31;
    for (size_t a = 0; a < 4; a++)
        for (size_t i = 0; i < arrays[a].n; i++)
            arrays[a].values[i] = gauss();
    for (int32_t t = 0; t < LATENT_TOKENS; t++)
        s.positions[t] = t;
    tqkv_calib_config_init(&config);
    config.n_layers = 1;
    assert_int_equal(tqkv_calib_create(&config, &calib), TQKV_OK);
    assert_int_equal(tqkv_calib_set_layer(calib, 0, &shape, s.w_o, DIM, 0, NULL), TQKV_OK);
    assert_int_equal(tqkv_calib_observe(calib, 0, LATENT_TOKENS, s.q, s.k, s.v, s.positions, scale, 0.0F, NULL),
                     TQKV_OK);
    for (int round = 0; round < 5; round++) {
        double x[LATENT], size[2] = {0};

        for (size_t i = 0; i < LATENT; i++)
            x[i] = (double)gauss();
        for (size_t h = 0; h < LATENT_HEADS; h++)
            for (size_t at = 64; at < LATENT_TOKENS; at += 8)
                add_query_sizes(&s, h, at, (double)scale, x, &size[0], &size[1]);
        for (int side = 0; side < 2; side++) {
            const double got = form(calib->layers[0].heads[side][0].metric, x, side ? LATENT : TURNED);
            assert_true(size[side] > 0.0 && fabs(got - size[side]) < 1e-4 * size[side]);
        }
    }
    tqkv_calib_destroy(calib);
}

static void budget_is_kept_and_spent(void **unused)
{
    sample *s = malloc(sizeof(*s));

    (void)unused;
    sample_make(s, 8);
    for (double bits = 2.0; bits < 6.0; bits += 0.7) {
        tqkv_plan *plan = make_plan(s, bits, NULL);
        tqkv_plan_info info;

        tqkv_plan_get_info(plan, &info);
        assert_true(info.bits_total <= bits);
        assert_true(info.bits_total > bits - 0.2); /* one step of one band of this tiny model is .11 */
        tqkv_plan_destroy(plan);
    }
    free(s);
}

static void sensitive_layers_get_more_bits(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_plan *plan;
    tqkv_plan_layer layers[2];
    tqkv_plan_info info;

    (void)unused;
    sample_make(s, 9);
    plan = make_plan(s, 3.0, NULL);
    tqkv_plan_get_info(plan, &info);
    for (uint32_t l = 0; l < 2; l++)
        assert_int_equal(tqkv_plan_get_layer(plan, l, &layers[l]), TQKV_OK);
    assert_true(layers[0].token_bytes[info.n_tiers - 1] > layers[1].token_bytes[info.n_tiers - 1]);
    tqkv_plan_destroy(plan);
    free(s);
}

/* Bytes of a store that holds the plan's context. */
static double bytes_of(const tqkv_plan *plan, uint32_t layer, uint32_t n_cells)
{
    tqkv_store_config config;
    tqkv_plan_info info;
    tqkv_store *store;
    double bytes;

    tqkv_plan_get_info(plan, &info);
    tqkv_store_config_init(&config);
    config.plan = plan;
    config.layer = layer;
    config.n_cells = n_cells;
    assert_int_equal(tqkv_store_create(&config, &store), TQKV_OK);
    bytes = (double)tqkv_store_bytes_at(store, info.context);
    tqkv_store_destroy(store);
    return bytes;
}

/* Codes reach to the end of the window, and no further if the young tiers do. */
static void check_window(const tqkv_plan_layer *layer, uint32_t n_tiers)
{
    uint32_t young = 0;

    for (uint32_t i = 0; i + 1 < n_tiers; i++)
        young += layer->tier_tokens[i];
    if (layer->window && young >= layer->window)
        assert_int_equal(layer->token_bytes[n_tiers - 1], 2 * N_KV); /* scales */
    else
        assert_true(layer->token_bytes[n_tiers - 1] > 2 * N_KV);
    if (layer->window == 512)
        assert_int_equal(young, 512 + 32);
}

/* What the plan says it takes is what stores take that hold its context. */
static void bits_are_those_of_the_store(void **unused)
{
    static const uint32_t windows[] = {0, 512, 3000};
    static const double wanted[] = {2.0, 3.2, 4.5};
    sample *s = malloc(sizeof(*s));

    (void)unused;
    for (size_t i = 0; i < 9; i++) {
        double bytes = 0.0, tokens = 0.0;
        tqkv_plan *plan;
        tqkv_plan_info info;

        sample_make(s, 14);
        s->window = windows[i % 3];
        plan = make_plan(s, wanted[i / 3], NULL);
        tqkv_plan_get_info(plan, &info);
        for (uint32_t l = 0; l < N_LAYERS; l++) {
            tqkv_plan_layer layer;

            assert_int_equal(tqkv_plan_get_layer(plan, l, &layer), TQKV_OK);
            const uint32_t n_cells = layer.window ? 2 * layer.window : info.context;
            bytes += bytes_of(plan, l, n_cells);
            tokens += n_cells;
            check_window(&layer, info.n_tiers);
        }
        bytes -= info.bits_total / 8.0 * tokens * N_KV * 2 * DIM;
        assert_true(bytes <= 0.0 && bytes > -(N_LAYERS * 2048.0)); /* blocks that may be used */
        assert_true(info.bits_total > wanted[i / 3] - 0.2 && info.bits_total <= wanted[i / 3]);
        tqkv_plan_destroy(plan);
    }
    free(s);
}

/* Runs tasks backwards: any dependence on their order shows. */
static void run_backwards(void *user, size_t n, tqkv_task_fn *fn, void *task)
{
    (void)user;
    for (size_t i = n; i-- > 0;)
        fn(task, i, i % 3);
}

static void same_input_gives_the_same_file(void **unused)
{
    const tqkv_parallel backwards = {.n_workers = 3, .run = run_backwards};
    sample *s = malloc(sizeof(*s));
    tqkv_plan *one, *two;
    tqkv_plan_info a, b;

    (void)unused;
    sample_make(s, 10);
    one = make_plan(s, 3.2, NULL);
    two = make_plan(s, 3.2, &backwards);
    tqkv_plan_get_info(one, &a);
    tqkv_plan_get_info(two, &b);
    assert_memory_equal(a.fingerprint, b.fingerprint, sizeof(a.fingerprint));
    tqkv_plan_destroy(one);
    tqkv_plan_destroy(two);
    free(s);
}

/* In a short context young tiers shrink; the newest tokens keep their 8 bits. */
static void newest_tokens_stay_wide_in_a_short_context(void **unused)
{
    sample *s = malloc(sizeof(*s));

    (void)unused;
    sample_make(s, 11);
    for (uint32_t context = 1024; context <= 4096; context *= 2) {
        tqkv_profile profile;
        tqkv_status status;
        tqkv_calib *calib = make_calib(s, NULL, &status);
        tqkv_plan *plan;

        assert_int_equal(status, TQKV_OK);
        tqkv_profile_init(&profile, NULL, 2.0, context);
        assert_int_equal(tqkv_calib_solve(calib, &profile, &plan), TQKV_OK);
        for (uint32_t l = 0; l < N_LAYERS; l++) {
            tqkv_plan_layer layer;
            uint32_t young = 0;

            assert_int_equal(tqkv_plan_get_layer(plan, l, &layer), TQKV_OK);
            assert_int_equal(layer.tier_tokens[0], 32);
            assert_int_equal(layer.token_bytes[0], 2 * N_KV * (DIM + 1));
            for (uint32_t i = 0; i < 3; i++)
                young += layer.tier_tokens[i];
            assert_true(young < context / 2);
            assert_true(layer.token_bytes[1] > layer.token_bytes[2] && layer.token_bytes[2] > 2 * N_KV);
        }
        tqkv_plan_destroy(plan);
        tqkv_calib_destroy(calib);
    }
    free(s);
}

/* A layer of a solved plan. */
static tqkv_plan_layer solved_layer(tqkv_calib *calib, double bits, uint32_t context, uint32_t index)
{
    tqkv_profile profile;
    tqkv_plan_layer layer;
    tqkv_plan *plan;

    tqkv_profile_init(&profile, NULL, bits, context);
    assert_int_equal(tqkv_calib_solve(calib, &profile, &plan), TQKV_OK);
    assert_int_equal(tqkv_plan_get_layer(plan, index, &layer), TQKV_OK);
    tqkv_plan_destroy(plan);
    return layer; /* its inv_freq is gone */
}

/* The last young tier grows with the context while all of them take no more than two fifths. */
static void young_tiers_grow_with_the_context(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_status status;
    tqkv_calib *calib;
    uint32_t before = 768;

    (void)unused;
    sample_make(s, 15);
    calib = make_calib(s, NULL, &status);
    assert_int_equal(status, TQKV_OK);
    for (uint32_t context = 8192; context <= 65536; context *= 2) {
        const tqkv_plan_layer layer = solved_layer(calib, 3.2, context, 0);
        double young = 0.0;

        assert_int_equal(layer.tier_tokens[0], 32);
        assert_int_equal(layer.tier_tokens[1], 224);
        assert_true(layer.tier_tokens[2] > before || context == 8192);
        before = layer.tier_tokens[2];
        for (uint32_t i = 0; i < 3; i++)
            young += (double)layer.tier_tokens[i] * layer.token_bytes[i];
        assert_true(young <= 0.4 * 3.2 / 8.0 * context * N_KV * 2 * DIM);
    }
    tqkv_calib_destroy(calib);
    free(s);
}

/* Where it cannot grow at its width it gives a bit for length, unless it were hardly wider than the mean then. */
static void a_wide_tier_gives_a_bit_for_length(void **unused)
{
    const uint32_t middle = N_KV * 2 * (DIM * 7 / 16 + 1); /* bytes of a token, 3.5 bits */
    sample *s = malloc(sizeof(*s));
    tqkv_status status;
    tqkv_calib *calib;
    tqkv_plan_layer layer;
    double young = 0.0;

    (void)unused;
    sample_make(s, 15);
    calib = make_calib(s, NULL, &status);
    assert_int_equal(status, TQKV_OK);
    layer = solved_layer(calib, 2.0, 16384, 0);
    assert_true(layer.tier_tokens[2] >= 2 * 768 && layer.token_bytes[2] < middle);
    for (uint32_t i = 0; i < 3; i++)
        young += (double)layer.tier_tokens[i] * layer.token_bytes[i];
    assert_true(young > 0.3 * 2.0 / 8.0 * 16384 * N_KV * 2 * DIM); /* .15 with 768 tokens of 4 bits */
    assert_true(young <= 0.55 * 2.0 / 8.0 * 16384 * N_KV * 2 * DIM);

    layer = solved_layer(calib, 2.6, 8192, 0);
    assert_true(layer.tier_tokens[2] == 768 && layer.token_bytes[2] > middle);
    layer = solved_layer(calib, 2.0, 3072, 0); /* narrow and short already */
    assert_true(layer.tier_tokens[2] < 768 && layer.token_bytes[2] < middle);
    tqkv_calib_destroy(calib);
    free(s);
}

/* Where the budget is short, tokens of a window are narrower than tokens of the same age elsewhere. */
static void windows_are_narrowed_first(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_plan_layer all, slides;
    tqkv_status status;
    tqkv_calib *calib;

    (void)unused;
    sample_make(s, 16);
    s->window = 512;
    calib = make_calib(s, NULL, &status);
    assert_int_equal(status, TQKV_OK);
    all = solved_layer(calib, 2.0, 3072, 0);
    slides = solved_layer(calib, 2.0, 3072, N_LAYERS - 1);
    assert_int_equal(all.token_bytes[0], slides.token_bytes[0]);
    for (uint32_t i = 1; i < 3; i++)
        assert_true(slides.token_bytes[i] < all.token_bytes[i]);
    tqkv_calib_destroy(calib);
    free(s);
}

static void budget_below_the_tiers_is_refused(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_profile profile;
    tqkv_status status;
    tqkv_calib *calib;
    tqkv_plan *plan;

    (void)unused;
    sample_make(s, 11);
    calib = make_calib(s, NULL, &status);
    assert_int_equal(status, TQKV_OK);
    tqkv_profile_init(&profile, NULL, 1.0, 1024); /* almost all of 1024 tokens are young */
    assert_int_equal(tqkv_calib_solve(calib, &profile, &plan), TQKV_ERR_INVALID_ARG);
    assert_null(plan);
    tqkv_calib_destroy(calib);
    free(s);
}

static void arguments_are_checked(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_calib_config config;
    tqkv_calib *calib = NULL;
    double distortion;

    (void)unused;
    sample_make(s, 12);
    tqkv_calib_config_init(&config);
    assert_int_equal(tqkv_calib_create(&config, &calib), TQKV_ERR_INVALID_ARG); /* no layers */
    config.n_layers = 1;
    config.gamma = 1.5F;
    assert_int_equal(tqkv_calib_create(&config, &calib), TQKV_ERR_INVALID_ARG);
    config.gamma = 1.0F;
    assert_int_equal(tqkv_calib_create(&config, &calib), TQKV_OK);
    assert_int_equal(tqkv_calib_prepare(NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_calib_set_layer(calib, 1, &s->shape, NULL, 0, 0, NULL), TQKV_ERR_INVALID_ARG);
    s->shape.k_dim = 24;
    assert_int_equal(tqkv_calib_set_layer(calib, 0, &s->shape, NULL, 0, 0, NULL), TQKV_ERR_UNSUPPORTED);
    s->shape.k_dim = DIM;
    s->shape.is_latent = 1; /* with two KV heads */
    assert_int_equal(tqkv_calib_set_layer(calib, 0, &s->shape, NULL, 0, 0, NULL), TQKV_ERR_UNSUPPORTED);
    s->shape.is_latent = 0;
    assert_int_equal(tqkv_calib_observe(calib, 0, N_TOKENS, s->q, s->k, s->v, s->positions, 1.0F, 0.0F, NULL),
                     TQKV_ERR_INVALID_ARG); /* layer not set */
    assert_int_equal(tqkv_calib_set_layer(calib, 0, &s->shape, NULL, 0, 0, NULL), TQKV_OK);
    assert_int_equal(tqkv_calib_prepare(calib, NULL), TQKV_ERR_INVALID_ARG); /* nothing seen */
    s->positions[5] = 77;
    assert_int_equal(tqkv_calib_observe(calib, 0, N_TOKENS, s->q, s->k, s->v, s->positions, 1.0F, 0.0F, NULL),
                     TQKV_ERR_INVALID_ARG);
    s->positions[5] = 5;
    assert_int_equal(tqkv_calib_observe(calib, 0, N_TOKENS, s->q, s->k, s->v, s->positions, 1.0F, 0.0F, NULL), TQKV_OK);
    assert_int_equal(tqkv_calib_prepare(calib, NULL), TQKV_OK);
    assert_int_equal(tqkv_calib_perturb(calib, 0, TQKV_SIDE_K, 9.0F, N_TOKENS, s->positions, s->k, &distortion, NULL),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_calib_perturb(calib, 0, TQKV_SIDE_K, 2.0F, N_TOKENS, s->positions, s->k, NULL, NULL),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_calib_set_sensitivity(calib, 0, TQKV_SIDE_K, 0.0, 1.0), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_calib_set_sensitivity(calib, 0, TQKV_SIDE_K, 0.1, 0.0), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_calib_set_sensitivity(calib, 0, TQKV_SIDE_K, 0.1, 1.0), TQKV_OK);
    tqkv_calib_destroy(calib);
    free(s);
}

/* An allocator that fails at its k-th call. */
typedef struct failing {
    size_t left, live;
} failing;

static void *failing_alloc(void *user, size_t bytes, size_t align)
{
    failing *f = user;

    if (f->left == 0)
        return NULL;
    f->left--;
    f->live++;
    return aligned_alloc(align, (bytes + align - 1) / align * align);
}

static void failing_free(void *user, void *ptr)
{
    failing *f = user;

    f->live--;
    free(ptr);
}

static void every_allocation_may_fail(void **unused)
{
    sample *s = malloc(sizeof(*s));
    tqkv_status status = TQKV_ERR_NO_MEMORY;

    (void)unused;
    sample_make(s, 13);
    for (size_t k = 0; status != TQKV_OK; k += k < 40 ? 1 : 7) {
        failing f = {.left = k};
        const tqkv_allocator mem = {&f, failing_alloc, failing_free};
        tqkv_calib *calib = make_calib(s, &mem, &status);

        assert_true(status == TQKV_OK || status == TQKV_ERR_NO_MEMORY);
        tqkv_calib_destroy(calib);
        assert_int_equal(f.live, 0);
        assert_true(k < 1000);
    }
    free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(eigenvectors_reproduce_the_matrix),
        cmocka_unit_test(eigenvectors_of_few_directions),
        cmocka_unit_test(eigenvectors_refuse_nan),
        cmocka_unit_test(allocation_spends_the_budget_where_it_helps),
        cmocka_unit_test(transform_whitens_rows_in_their_frame),
        cmocka_unit_test(latents_are_weighed_as_keys_and_values),
        cmocka_unit_test(budget_is_kept_and_spent),
        cmocka_unit_test(sensitive_layers_get_more_bits),
        cmocka_unit_test(bits_are_those_of_the_store),
        cmocka_unit_test(same_input_gives_the_same_file),
        cmocka_unit_test(newest_tokens_stay_wide_in_a_short_context),
        cmocka_unit_test(young_tiers_grow_with_the_context),
        cmocka_unit_test(a_wide_tier_gives_a_bit_for_length),
        cmocka_unit_test(windows_are_narrowed_first),
        cmocka_unit_test(budget_below_the_tiers_is_refused),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(every_allocation_may_fail),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
