/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plugin inside a real, unmodified libllama: what the tools do not reach. Every test runs one
 * model twice, with its cache in llama.cpp's own memory and in ours, and compares logits; or saves,
 * copies and moves cells and compares bytes.
 *
 *     host_state [model.gguf] [plan.tqkv]
 *     host_state --compare model.gguf      only what needs no text: f16 and q8 against stock
 *     host_state --tiers model.gguf        and with a plan
 *
 * Model: the argument, or the first of TQKV_TEST_MODELS; none: skipped (77). Plugin:
 * TQKV_TEST_PLUGIN, or the one that was built beside this program. With a second argument the plan
 * that the program calibrates for itself is left there.
 */
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <llama.h>
#include <turboquant/ggml_plugin.h>
#include <turboquant/turboquant.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef TQKV_PLUGIN_PATH
#define TQKV_PLUGIN_PATH ""
#endif

enum { N_CTX = 256, N_TEXT = 112, N_SINGLE = 8 };

static const char text[] =
    "The river rises in the hills above the old town, where a spring feeds a small pond. From "
    "there it runs south through meadows and orchards until it meets the canal. In 1843 an "
    "engineer proposed a lock at this place, but the council refused: the cost, 12,400 crowns, "
    "was more than the town earned in three years. def area(width, height):\n    return width * "
    "height\n\nfor i in range(10):\n    print(area(i, i + 1))\n\nThe lock was finally built by "
    "the railway company, which needed water for its engines. It still works today, and every "
    "summer hundreds of boats pass through it on their way to the lakes in the north.";

static tqkv_plugin_configure_fn *configure;
static tqkv_plugin_set_observer_fn *set_observer;
static tqkv_plugin_kv_bytes_fn *kv_bytes;
static tqkv_plugin_kv_rows_fn *kv_rows;

static struct llama_model *stock_model, *our_model;
static const struct llama_vocab *vocab;
static llama_token tokens[1024];
static int n_tokens, n_vocab;
static char plan_path[512];
static int n_passed, n_failed;
static int test_failed;

static void check(int ok, const char *what)
{
    if (ok)
        return;
    test_failed = 1;
    printf("    FAILED: %s\n", what);
}

static void check_below(double value, double bound, const char *what)
{
    if (value <= bound) /* false for NaN */
        return;
    test_failed = 1;
    printf("    FAILED: %s: %.3g > %.3g\n", what, value, bound);
}

/* --- the host --- */

static struct llama_model *load(const char *path, ggml_backend_dev_t device)
{
    ggml_backend_dev_t devices[] = {device, NULL};
    struct llama_model_params params = llama_model_default_params();

    params.devices = devices;
    return llama_model_load_from_file(path, params);
}

typedef struct options {
    uint32_t n_seq;
    int split; /* a stream for each sequence */
    int no_flash;
    enum ggml_type type; /* 0, f32, means f16 */
    uint32_t n_ubatch;
    int n_threads;
} options;

static struct llama_context *make(struct llama_model *model, const char *mode, options o)
{
    struct llama_context_params params = llama_context_default_params();

    /* NULL: stock */
    if (mode && strcmp(mode, "plan") == 0)
        check(configure("auto", plan_path) == 0, "configure with a plan");
    else if (mode)
        check(configure(mode, NULL) == 0, "configure");
    params.n_seq_max = o.n_seq ? o.n_seq : 1;
    params.n_ctx = o.split ? N_CTX * params.n_seq_max : N_CTX;
    params.n_batch = N_CTX;
    params.n_ubatch = o.n_ubatch ? o.n_ubatch : 64;
    params.n_threads = params.n_threads_batch = o.n_threads ? o.n_threads : 1;
    params.kv_unified = !o.split;
    params.flash_attn_type =
        o.no_flash ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    if (o.type)
        params.type_k = params.type_v = o.type;
    struct llama_context *ctx = llama_init_from_model(model, params);
    check(ctx != NULL, "context");
    return ctx;
}

/* Decodes text [from, to) as sequence seq from position pos on; logits of the last token. */
static const float *feed(struct llama_context *ctx, int from, int to, int pos, int seq)
{
    struct llama_batch batch = llama_batch_init(to - from, 0, 1);

    for (int i = from; i < to; i++) {
        const int j = i - from;
        batch.token[j] = tokens[i % n_tokens];
        batch.pos[j] = pos + j;
        batch.n_seq_id[j] = 1;
        batch.seq_id[j][0] = seq;
        batch.logits[j] = i == to - 1;
    }
    batch.n_tokens = to - from;
    const int rc = llama_decode(ctx, batch);
    llama_batch_free(batch);
    check(rc == 0, "llama_decode");
    return rc == 0 ? llama_get_logits_ith(ctx, -1) : NULL;
}

static float *copy_logits(const float *logits)
{
    float *copy = malloc((size_t)n_vocab * sizeof(*copy));

    if (copy && logits)
        memcpy(copy, logits, (size_t)n_vocab * sizeof(*copy));
    return copy;
}

/* KL divergence of the distribution of b from that of a. */
static double divergence(const float *a, const float *b)
{
    double max_a = -INFINITY, max_b = -INFINITY, sum_a = 0, sum_b = 0, kl = 0;

    if (!a || !b)
        return NAN;
    for (int i = 0; i < n_vocab; i++) {
        max_a = fmax(max_a, a[i]);
        max_b = fmax(max_b, b[i]);
    }
    for (int i = 0; i < n_vocab; i++) {
        sum_a += exp(a[i] - max_a);
        sum_b += exp(b[i] - max_b);
    }
    for (int i = 0; i < n_vocab; i++) {
        const double la = a[i] - max_a - log(sum_a), lb = b[i] - max_b - log(sum_b);
        kl += exp(la) * (la - lb);
    }
    return kl;
}

static double largest_difference(const float *a, const float *b)
{
    double max = 0;

    if (!a || !b)
        return NAN;
    for (int i = 0; i < n_vocab; i++)
        max = fmax(max, fabs((double)a[i] - b[i]));
    return max;
}

/* --- comparisons with stock --- */

/* Mean KL over the last tokens of the text, fed one at a time after a prompt. */
static double compare(const char *mode, options o, int shift)
{
    struct llama_context *stock = make(stock_model, NULL, o), *ours = make(our_model, mode, o);
    double kl = 0;
    const int prompt = N_TEXT - N_SINGLE;

    if (!stock || !ours)
        return NAN;
    struct llama_context *both[] = {stock, ours};
    int moved = 0;
    for (int i = 0; i < 2; i++) {
        feed(both[i], 0, prompt, 0, 0);
        if (shift) {
            llama_memory_t memory = llama_get_memory(both[i]);
            check(llama_memory_seq_rm(memory, 0, 20, 61), "seq_rm");
            llama_memory_seq_add(memory, 0, 61, -1, -41);
            moved = 41;
        }
    }
    for (int i = prompt; i < N_TEXT; i++) {
        float *want = copy_logits(feed(stock, i, i + 1, i - moved, 0));
        kl += divergence(want, feed(ours, i, i + 1, i - moved, 0)) / N_SINGLE;
        free(want);
    }
    llama_free(stock);
    llama_free(ours);
    printf("    %s: mean KL %.2g\n", mode, kl);
    return kl;
}

static void test_same_as_stock(void)
{
    /* f16 is lossless; another order of summation remains, amplified by quantised weights */
    check_below(compare("f16", (options){0}, 0), 0.02, "f16");
    check_below(compare("q8", (options){0}, 0), 0.03, "q8");
    check_below(compare("plan", (options){0}, 0), 0.5, "plan");
}

static void test_shift(void)
{
    check_below(compare("f16", (options){0}, 1), 0.02, "f16");
    check_below(compare("q8", (options){0}, 1), 0.03, "q8");
    check_below(compare("plan", (options){0}, 1), 0.5, "plan");
    check_below(compare("f16", (options){.n_seq = 2, .split = 1}, 1), 0.02, "f16, two streams");
}

static void test_declared_types(void)
{
    const enum ggml_type types[] = {GGML_TYPE_Q8_0, GGML_TYPE_BF16};

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        check_below(compare("q8", (options){.type = types[i]}, 0), 0.05, "decoding");
        if (types[i] != GGML_TYPE_BF16) /* llama.cpp's CPU cannot shift those itself */
            check_below(compare("q8", (options){.type = types[i]}, 1), 0.05, "shift");
    }
}

static void test_no_flash_attention(void)
{
    const options o = {.no_flash = 1};
    struct llama_context *stock = make(stock_model, NULL, o), *ours = make(our_model, "q8", o);

    float *want = copy_logits(feed(stock, 0, 100, 0, 0));
    check_below(largest_difference(want, feed(ours, 0, 100, 0, 0)), 0, "prompt");
    free(want);
    want = copy_logits(feed(stock, 100, 101, 100, 0));
    check_below(largest_difference(want, feed(ours, 100, 101, 100, 0)), 0, "one token");
    free(want);
    llama_free(stock);
    llama_free(ours);
}

static void test_threads(void)
{
    struct llama_context *one = make(our_model, "plan", (options){0});
    struct llama_context *two = make(our_model, "plan", (options){.n_threads = 2});

    for (int i = 0; i < 3; i++) {
        const int from = i ? 60 + i : 0, to = 61 + i;
        float *want = copy_logits(feed(one, from, to, from, 0));
        check_below(largest_difference(want, feed(two, from, to, from, 0)), 0,
                    "two threads as one");
        free(want);
    }
    llama_free(one);
    llama_free(two);
}

static void test_interleaved_sequences(void)
{
    for (int split = 0; split < 2; split++) {
        const options o = {.n_seq = 3, .split = split};
        struct llama_context *both[] = {make(stock_model, NULL, o), make(our_model, "f16", o)};
        float *want = NULL;
        for (int i = 0; i < 2; i++) {
            struct llama_batch batch = llama_batch_init(3 * 20, 0, 1);
            for (int j = 0; j < 60; j++) {
                batch.token[j] = tokens[(j % 3) * 30 + j / 3];
                batch.pos[j] = j / 3;
                batch.n_seq_id[j] = 1;
                batch.seq_id[j][0] = j % 3;
                batch.logits[j] = 0;
            }
            batch.n_tokens = 60;
            check(llama_decode(both[i], batch) == 0, "decode");
            llama_batch_free(batch);
            const float *logits = feed(both[i], 60, 61, 20, 1);
            if (i == 0)
                want = copy_logits(logits);
            else
                check_below(divergence(want, logits), 0.05, split ? "streams" : "unified");
        }
        free(want);
        llama_free(both[0]);
        llama_free(both[1]);
    }
}

/* --- states --- */

typedef struct bytes {
    uint8_t *data;
    size_t n;
} bytes;

static bytes save(struct llama_context *ctx, int seq)
{
    bytes b = {.n = seq < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, seq)};

    b.data = calloc(1, b.n + 1);
    const size_t n = seq < 0 ? llama_state_get_data(ctx, b.data, b.n)
                             : llama_state_seq_get_data(ctx, b.data, b.n, seq);
    check(n > 0 && n <= b.n, "saving");
    b.n = n;
    return b;
}

static void restore(struct llama_context *ctx, bytes b, int seq)
{
    const size_t n = seq < 0 ? llama_state_set_data(ctx, b.data, b.n)
                             : llama_state_seq_set_data(ctx, b.data, b.n, seq);
    check(n == b.n, "restoring");
}

static int same_bytes(bytes a, bytes b)
{
    return a.n == b.n && memcmp(a.data, b.data, a.n) == 0;
}

/*
 * The same K and V. Before them a state tells the cells: one byte of each names the sequence, and
 * an empty stream takes four bytes, before the full one or after it.
 */
static int same_rows(bytes a, bytes b, size_t n_cells)
{
    for (size_t shift = 0; shift <= 4 && a.n == b.n; shift += 4) {
        size_t n_different = 0;
        for (size_t i = 256 + 16 * n_cells; i + shift < a.n; i++)
            n_different += a.data[i] != b.data[i + shift];
        if (n_different <= 2 * n_cells)
            return 1;
    }
    return 0;
}

static void state_round_trip(const char *mode, int split, enum ggml_type type)
{
    const options o = {.n_seq = 2, .split = split, .type = type};
    struct llama_context *a = make(our_model, mode, o), *b = make(our_model, mode, o);
    const int has_tiers = strcmp(mode, "plan") == 0;

    feed(a, 0, 90, 0, 0);
    for (int i = 90; i < 100; i++)
        feed(a, i, i + 1, i, 0);

    bytes first = save(a, 0);
    restore(b, first, 0);
    bytes second = save(b, 0);
    check(same_bytes(first, second), "sequence saved, restored in another context, saved");
    free(second.data);
    float *want = copy_logits(feed(a, 100, 101, 100, 0));
    /* Restored tokens take the slots of a young tier in another order: sums round otherwise. */
    check_below(divergence(want, feed(b, 100, 101, 100, 0)), has_tiers ? 0.02 : 0,
                "going on in another context");

    /* beside the sequence that it came from; they share the tiers where they share a stream */
    restore(b, first, 1);
    second = save(b, 1);
    check(same_rows(first, second, 100), "sequence saved, restored as another, saved");
    check_below(divergence(want, feed(b, 100, 101, 100, 1)), 0.02, "going on as another sequence");
    free(first.data);
    free(second.data);

    if (!split) { /* whole states of split caches are broken in llama.cpp itself */
        first = save(a, -1);
        restore(b, first, -1);
        second = save(b, -1);
        check(same_bytes(first, second), "context saved, restored, saved");
        free(first.data);
        free(second.data);
    }
    free(want);
    llama_free(a);
    llama_free(b);
}

static void test_states(void)
{
    state_round_trip("f16", 0, 0);
    state_round_trip("q8", 0, 0);
    state_round_trip("plan", 0, 0);
    state_round_trip("plan", 1, 0);
}

/* Whether the context that was made last keeps nothing in stores of ours. */
static int all_plain(void)
{
    struct llama_context *ctx = make(our_model, "f16", (options){0});
    tqkv_plugin_bytes total;

    feed(ctx, 0, 8, 0, 0);
    const size_t n = kv_bytes(&total, NULL, 0);
    const int can_move = llama_memory_can_shift(llama_get_memory(ctx)) &&
                         llama_memory_seq_rm(llama_get_memory(ctx), 0, 2, 4);
    printf("    %zu layers, %u plain, cells can%s move\n", n, total.plain, can_move ? "" : "not");
    llama_free(ctx);
    return (total.plain == n) | can_move << 1;
}

/* A model without words, of an architecture that the other tests do not have. */
static void test_compare(void)
{
    const int found = all_plain(), plain = found & 1, can_move = found >> 1;

    check_below(compare("f16", (options){0}, 0), plain ? 0 : 1e-3, "f16");
    check_below(compare("f16", (options){.n_seq = 2, .split = 1, .n_ubatch = 7}, 0),
                plain ? 0 : 1e-3, "small batches");
    check_below(compare("q8", (options){0}, 0), plain ? 0 : 1e-2, "q8");
    if (can_move)
        check_below(compare("f16", (options){0}, 1), plain ? 0 : 1e-3, "shift");
    check_below(compare("f16", (options){.no_flash = 1}, 0), 0, "without flash attention");
    state_round_trip("f16", 0, 0);
    state_round_trip("q8", 0, 0);
}

static void test_portable_states(void)
{
    setenv("TQKV_STATE", "portable", 1);
    state_round_trip("q8", 0, 0);
    struct llama_context *ours = make(our_model, "plan", (options){0});
    unsetenv("TQKV_STATE");
    struct llama_context *stock = make(stock_model, NULL, (options){0});

    /* what we saved serves a stock llama.cpp, and the other way round */
    feed(ours, 0, 100, 0, 0);
    bytes saved = save(ours, 0);
    restore(stock, saved, 0);
    float *want = copy_logits(feed(ours, 100, 101, 100, 0));
    check_below(divergence(want, feed(stock, 100, 101, 100, 0)), 0.05, "ours to stock");
    free(saved.data);
    llama_memory_clear(llama_get_memory(ours), true);
    saved = save(stock, 0);
    restore(ours, saved, 0);
    float *then = copy_logits(feed(stock, 101, 102, 101, 0));
    check_below(divergence(then, feed(ours, 101, 102, 101, 0)), 0.2, "stock to ours");
    free(saved.data);
    free(want);
    free(then);
    llama_free(ours);
    llama_free(stock);
}

static void test_foreign_records(void)
{
    struct llama_context *a = make(our_model, "q8", (options){0});
    struct llama_context *b = make(our_model, "f16", (options){0});

    feed(a, 0, 40, 0, 0);
    bytes saved = save(a, 0);
    restore(b, saved, 0);
    check(feed(b, 40, 41, 40, 0) != NULL, "goes on with empty cells");
    free(saved.data);
    llama_free(a);
    llama_free(b);
}

static void test_copies(void)
{
    const char *modes[] = {"f16", "q8", "plan"};

    for (size_t m = 0; m < 3; m++) {
        for (int split = 0; split < 2; split++) {
            struct llama_context *ctx =
                make(our_model, modes[m], (options){.n_seq = 2, .split = split});
            feed(ctx, 0, 100, 0, 0);
            feed(ctx, 50, 60, 0, 1); /* what the copy replaces */
            llama_memory_t memory = llama_get_memory(ctx);
            llama_memory_seq_rm(memory, 1, -1, -1);
            llama_memory_seq_cp(memory, 0, 1, -1, -1);
            float *want = copy_logits(feed(ctx, 100, 101, 100, 0));
            check_below(divergence(want, feed(ctx, 100, 101, 100, 1)), 1e-4,
                        split ? "to another stream" : "in one stream");
            free(want);
            llama_free(ctx);
        }
    }
}

/* --- what programs are told --- */

typedef struct seen {
    int n_events, last_layer, ok, n_expected;
} seen;

static void look(void *user, const tqkv_plugin_event *event)
{
    seen *s = user;

    s->ok = s->ok && (int)event->layer > s->last_layer && (int)event->n_tokens == s->n_expected &&
            event->positions && event->rope.style != TQKV_ROPE_NONE && event->scale > 0 &&
            event->n_heads % event->n_kv_heads == 0;
    for (uint32_t t = 0; s->ok && t < event->n_tokens; t++)
        s->ok = event->positions[t] == (int)t && isfinite(event->q[t * event->q_token_stride]) &&
                isfinite(event->k[t * event->n_kv_heads * event->k_dim]);
    s->last_layer = (int)event->layer;
    s->n_events++;
}

static void test_observer(void)
{
    struct llama_context *ctx = make(our_model, "f16", (options){0});
    seen s = {.last_layer = -1, .ok = 1, .n_expected = 50};

    set_observer(look, &s);
    feed(ctx, 0, 50, 0, 0);
    set_observer(NULL, NULL);
    check(s.ok, "events in order, with positions and RoPE");
    check(s.n_events == llama_model_n_layer(our_model), "one event per layer");
    llama_free(ctx);
}

static void test_bytes(void)
{
    struct llama_context *a = make(our_model, "f16", (options){0});
    tqkv_plugin_bytes total, layers[256];

    feed(a, 0, 100, 0, 0);
    check((int)kv_bytes(&total, layers, 256) == llama_model_n_layer(our_model), "layers");
    check(total.held > total.f16_held * 9 / 10 && total.reserved >= total.f16_reserved, "f16");
    /* another configuration beside it */
    struct llama_context *b = make(our_model, "plan", (options){0});
    feed(b, 0, 100, 0, 0);
    kv_bytes(&total, NULL, 0);
    check(total.reserved < total.f16_reserved / 2 && total.plain == 0, "plan");
    check(total.held > 0 && total.held < total.f16_reserved / 2, "plan, held");
    check(feed(a, 100, 101, 100, 0) != NULL, "the first goes on");
    llama_memory_clear(llama_get_memory(b), true);
    kv_bytes(&total, NULL, 0);
    check(total.f16_held == 0, "cleared");
    llama_free(a);
    llama_free(b);
}

/* Rows of a layer taken out, changed and put back: the answer changes and is the same again. */
static void test_rows(void)
{
    enum { LAYER = 3, N = 64 };
    struct llama_context *ctx = make(our_model, "f16", (options){0});
    const size_t most = (size_t)N * 8192; /* values of a row, at most */
    float *rows = malloc(most * sizeof(float)), *zero = calloc(most, sizeof(float));
    float *before = malloc((size_t)n_vocab * sizeof(float));

    check(kv_rows(LAYER, TQKV_SIDE_V, 0, N, rows, 0) != 0, "nothing is held yet");
    feed(ctx, 0, N, 0, 0);
    memcpy(before, feed(ctx, N, N + 1, N, 0), (size_t)n_vocab * sizeof(float));
    for (uint32_t side = TQKV_SIDE_K; side <= TQKV_SIDE_V; side++) {
        check(kv_rows(LAYER, side, 0, N, rows, 0) == 0 && rows[5] != 0.0f, "reading");
        check(kv_rows(LAYER, side, 0, N, zero, 1) == 0, "writing");
        llama_memory_seq_rm(llama_get_memory(ctx), 0, N, -1);
        check(memcmp(before, feed(ctx, N, N + 1, N, 0), (size_t)n_vocab * sizeof(float)) != 0,
              "other rows, another answer");
        check(kv_rows(LAYER, side, 0, N, rows, 1) == 0, "writing back");
        llama_memory_seq_rm(llama_get_memory(ctx), 0, N, -1);
        check(memcmp(before, feed(ctx, N, N + 1, N, 0), (size_t)n_vocab * sizeof(float)) == 0,
              "the same answer again");
    }
    check(kv_rows(1000, TQKV_SIDE_K, 0, 1, rows, 0) != 0, "no such layer");
    check(kv_rows(LAYER, 2, 0, 1, rows, 0) != 0, "no such side");
    check(kv_rows(LAYER, TQKV_SIDE_K, N_CTX, 1, rows, 0) != 0, "past the cells");
    llama_free(ctx);
    free(rows);
    free(zero);
    free(before);
}

static void test_bad_settings(void)
{
    char path[600];

    check(configure("fast", NULL) == -1, "unknown mode");
    check(configure("auto", "/nonexistent/x.tqkv") == -1, "missing plan");
    snprintf(path, sizeof(path), "%s.cut", plan_path);
    FILE *in = fopen(plan_path, "rb"), *out = fopen(path, "wb");
    for (int i = 0, c; in && out && i < 5000 && (c = fgetc(in)) != EOF; i++)
        fputc(c, out);
    if (in)
        fclose(in);
    if (out)
        fclose(out);
    check(configure("auto", path) == -1, "truncated plan");
    remove(path);
    check(configure(NULL, NULL) == 0, "back to the environment");
}

/* --- a plan of our own: few tokens, so a poor one, but with everything in it --- */

typedef struct calibration {
    tqkv_calib *calib;
    int failed;
    unsigned char known[256]; /* layers whose shape has been told */
} calibration;

static void observe_for_plan(void *user, const tqkv_plugin_event *event)
{
    calibration *c = user;
    const size_t n = event->n_tokens, heads = event->n_heads, k_dim = event->k_dim;
    const size_t dim = k_dim + (event->q_latent ? event->v_dim : 0);
    const tqkv_plan_layer shape = {.n_heads = event->n_heads,
                                   .n_kv_heads = event->n_kv_heads,
                                   .k_dim = event->k_dim,
                                   .v_dim = event->v_dim,
                                   .rope = event->rope,
                                   .is_latent = event->q_latent != NULL};
    float *q = malloc(n * heads * dim * sizeof(float));

    for (size_t i = 0; i < n * heads; i++) {
        const size_t from = i / heads * event->q_token_stride + i % heads * event->q_head_stride;
        memcpy(q + i * dim, event->q + from, k_dim * sizeof(float));
        if (event->q_latent)
            memcpy(q + i * dim + k_dim, event->q_latent + from, (dim - k_dim) * sizeof(float));
    }
    if (!c->known[event->layer])
        c->failed |=
            tqkv_calib_set_layer(c->calib, event->layer, &shape, NULL, 0, 0, NULL) != TQKV_OK;
    c->known[event->layer] = 1;
    c->failed |=
        tqkv_calib_observe(c->calib, event->layer, n, q, event->k, event->v, event->positions,
                           event->scale, event->softcap, NULL) != TQKV_OK;
    free(q);
}

static void make_plan(void)
{
    tqkv_calib_config config;
    tqkv_profile profile;
    calibration c = {0};
    tqkv_plan *plan = NULL;

    tqkv_calib_config_init(&config);
    config.model = "test";
    config.arch = "test";
    config.n_layers = (uint32_t)llama_model_n_layer(our_model);
    check(tqkv_calib_create(&config, &c.calib) == TQKV_OK, "calibration");
    struct llama_context *ctx = make(our_model, "f16", (options){.n_ubatch = N_CTX});
    set_observer(observe_for_plan, &c);
    for (int i = 0; i < 3; i++) {
        llama_memory_clear(llama_get_memory(ctx), true);
        feed(ctx, 50 * i, 50 * i + N_CTX - 2, 0, 0);
    }
    set_observer(NULL, NULL);
    llama_free(ctx);
    check(!c.failed, "observing");
    check(tqkv_calib_prepare(c.calib, NULL) == TQKV_OK, "preparing");
    tqkv_profile_init(&profile, "5x", 3.6, 2048);
    check(tqkv_calib_solve(c.calib, &profile, &plan) == TQKV_OK, "solving");
    check(plan && tqkv_plan_save(plan, plan_path, NULL) == TQKV_OK, "saving the plan");
    tqkv_plan_destroy(plan);
    tqkv_calib_destroy(c.calib);
}

/* Its tiers in a model without words: copies and states. */
static void test_with_plan(void)
{
    make_plan();
    check_below(compare("plan", (options){0}, 0), 0.5, "plan");
    state_round_trip("plan", 0, 0);
    state_round_trip("plan", 1, 0);
    test_copies();
}

/* --- running --- */

static void quiet(enum ggml_log_level level, const char *line, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(line, stderr);
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *find(ggml_backend_reg_t reg, const char *name)
{
    void *function = ggml_backend_reg_get_proc_address(reg, name);

    check(function != NULL, name);
    return function;
}

static int set_up(const char *model, const char *plan)
{
    const char *plugin = getenv("TQKV_TEST_PLUGIN");

    llama_log_set(quiet, NULL);
    llama_backend_init();
    ggml_backend_reg_t reg = ggml_backend_load(plugin && *plugin ? plugin : TQKV_PLUGIN_PATH);
    if (!reg) {
        printf("cannot load the plugin\n");
        return 0;
    }
    void *functions[] = {find(reg, TQKV_PLUGIN_CONFIGURE), find(reg, TQKV_PLUGIN_SET_OBSERVER),
                         find(reg, TQKV_PLUGIN_KV_BYTES), find(reg, TQKV_PLUGIN_KV_ROWS)};
    memcpy(&configure, &functions[0], sizeof(void *));
    memcpy(&set_observer, &functions[1], sizeof(void *));
    memcpy(&kv_bytes, &functions[2], sizeof(void *));
    memcpy(&kv_rows, &functions[3], sizeof(void *));
    stock_model = load(model, NULL);
    our_model = load(model, ggml_backend_reg_dev_get(reg, 0));
    if (!stock_model || !our_model) {
        printf("cannot load %s\n", model);
        return 0;
    }
    vocab = llama_model_get_vocab(our_model);
    n_vocab = llama_vocab_n_tokens(vocab);
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        uint32_t seed = 1;
        for (n_tokens = 0; n_tokens < 200; n_tokens++, seed = seed * 1664525u + 1013904223u)
            tokens[n_tokens] = (llama_token)((seed >> 8) % (uint32_t)n_vocab);
    } else {
        n_tokens = llama_tokenize(vocab, text, (int)strlen(text), tokens, 1024, true, false);
    }
    if (plan)
        snprintf(plan_path, sizeof(plan_path), "%s", plan);
    else
        snprintf(plan_path, sizeof(plan_path), "/tmp/host_state_%d.tqkv", (int)getpid());
    return n_tokens > 64;
}

typedef struct test {
    const char *name;
    void (*run)(void);
} test;

static void run_tests(const test *tests, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double start = seconds();
        test_failed = 0;
        printf("%s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
        printf("    %.1f s\n", seconds() - start);
        n_failed += test_failed;
        n_passed += !test_failed;
    }
}

int main(int argc, char **argv)
{
    static const test all[] = {
        {"make_plan", make_plan},
        {"same_as_stock", test_same_as_stock},
        {"shift", test_shift},
        {"declared_types", test_declared_types},
        {"no_flash_attention", test_no_flash_attention},
        {"threads", test_threads},
        {"interleaved_sequences", test_interleaved_sequences},
        {"states", test_states},
        {"portable_states", test_portable_states},
        {"foreign_records", test_foreign_records},
        {"copies", test_copies},
        {"observer", test_observer},
        {"bytes", test_bytes},
        {"rows", test_rows},
        {"bad_settings", test_bad_settings},
    };
    static const test wordless[] = {{"compare", test_compare}, {"with_plan", test_with_plan}};
    const int only_compare = argc > 2 && argv[1][0] == '-';
    const char *plan = argc > 2 && !only_compare ? argv[2] : NULL;
    const char *models = getenv("TQKV_TEST_MODELS");
    char model[512] = "";

    if (argc > 1)
        snprintf(model, sizeof(model), "%s", argv[only_compare ? 2 : 1]);
    else if (models && *models)
        snprintf(model, sizeof(model), "%s/smollm2-135m-q4_1.gguf", models);
    if (!*model || access(model, R_OK) != 0) {
        printf("skipped: no model; set TQKV_TEST_MODELS\n");
        return 77;
    }
    if (!set_up(model, plan))
        return 1;
    if (only_compare)
        run_tests(wordless, strcmp(argv[1], "--tiers") == 0 ? 2 : 1);
    else
        run_tests(all, sizeof(all) / sizeof(all[0]));
    llama_model_free(stock_model);
    llama_model_free(our_model);
    llama_backend_free();
    if (!plan)
        remove(plan_path);
    printf("%d passed, %d failed, 0 skipped\n", n_passed, n_failed);
    return n_failed != 0;
}
