/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a real libllama runs the graphs that we take part in: in pieces, with more threads than
 * cores, stopped in the middle; and how a short context becomes a long one.
 *
 *     host_graph model.gguf [test]
 *
 * Plugin: TQKV_TEST_PLUGIN.
 */
#include <ggml-backend.h>
#include <llama.h>
#include <turboquant/ggml_plugin.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_PROMPT = 40, N_SINGLE = 4, N_TOKENS = N_PROMPT + N_SINGLE };

static struct llama_model *model, *stock_model;
static tqkv_plugin_kv_bytes_fn *kv_bytes;
static int n_vocab;
static llama_token tokens[N_TOKENS];
static int n_passed, n_failed, test_failed;

static void check(int ok, const char *what)
{
    if (ok)
        return;
    test_failed = 1;
    printf("    FAILED: %s\n", what);
}

static struct llama_context *make_of(struct llama_model *of, int n_threads,
                                     ggml_backend_sched_eval_callback callback, void *user)
{
    struct llama_context_params params = llama_context_default_params();

    params.n_ctx = 256;
    params.n_batch = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval = callback;
    params.cb_eval_user_data = user;
    return llama_init_from_model(of, params);
}

static struct llama_context *make(int n_threads, ggml_backend_sched_eval_callback callback,
                                  void *user)
{
    return make_of(model, n_threads, callback, user);
}

/* Decodes tokens [from, to); returns what llama_decode says. */
static int feed(struct llama_context *ctx, int from, int to)
{
    struct llama_batch batch = llama_batch_init(to - from, 0, 1);

    for (int i = from; i < to; i++) {
        const int j = i - from;
        batch.token[j] = tokens[i];
        batch.pos[j] = i;
        batch.n_seq_id[j] = 1;
        batch.seq_id[j][0] = 0;
        batch.logits[j] = i == to - 1;
    }
    batch.n_tokens = to - from;
    const int rc = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return rc;
}

/* Logits after all tokens: a prompt, then one at a time. The caller frees. */
static float *logits_of(struct llama_context *ctx)
{
    const size_t bytes = (size_t)n_vocab * sizeof(float);
    float *copy = calloc(1, bytes);

    check(feed(ctx, 0, N_PROMPT) == 0, "the prompt");
    for (int i = N_PROMPT; i < N_TOKENS; i++)
        check(feed(ctx, i, i + 1) == 0, "a token");
    const float *logits = llama_get_logits_ith(ctx, -1);
    if (copy && logits)
        memcpy(copy, logits, bytes);
    return copy;
}

static double largest_difference(const float *a, const float *b, double *size)
{
    double difference = 0.0;

    *size = 0.0;
    for (int i = 0; i < n_vocab; i++) {
        difference = fmax(difference, fabs((double)a[i] - b[i]));
        *size = fmax(*size, fabs((double)a[i]));
    }
    return difference;
}

static float *expected(int n_threads)
{
    struct llama_context *ctx = make(n_threads, NULL, NULL);
    float *logits = logits_of(ctx);

    llama_free(ctx);
    return logits;
}

/* Five threads on however few cores compute what one does, bit by bit. */
static void test_many_threads(void)
{
    float *one = expected(1), *five = expected(5);
    double size;

    check(largest_difference(one, five, &size) == 0.0 && size > 0.0, "five threads as one");
    free(one);
    free(five);
}

typedef struct watch {
    int n_seen, n_attention, n_other;
} watch;

/* Asks for every second node and looks at it, so that pieces begin and end anywhere. */
static bool look(struct ggml_tensor *t, bool ask, void *user)
{
    watch *w = user;

    if (ask)
        return w->n_seen++ % 2 == 0;
    if (t->op == GGML_OP_FLASH_ATTN_EXT)
        w->n_attention++;
    w->n_other += t->op == GGML_OP_CUSTOM; /* nobody outside sees what we make of a node */
    return true;
}

/* K and V may be encoded one by one then, and nothing else changes. */
static void test_pieces(void)
{
    watch w = {0};
    float *want = expected(2);
    struct llama_context *ctx = make(2, look, &w);
    float *got = logits_of(ctx);
    double size;

    const double difference = largest_difference(want, got, &size);
    printf("    %d nodes, %d of attention: difference %.2g of %.2g\n", w.n_seen, w.n_attention,
           difference, size);
    check(w.n_attention > 0 && w.n_other == 0, "nodes as the host made them");
    check(difference <= 0.02 * size && size > 0.0, "in pieces as in one");
    free(want);
    free(got);
    llama_free(ctx);
}

static bool stop_after(void *user)
{
    int *left = user;

    return --*left < 0;
}

/* A graph that stops anywhere leaves nothing behind. */
static void test_abort(void)
{
    float *want = expected(2);
    struct llama_context *ctx = make(2, NULL, NULL);
    double size;

    for (int nodes = 1; nodes < 40; nodes += 3) { /* of some 60 */
        int left = nodes;
        llama_set_abort_callback(ctx, stop_after, &left);
        check(feed(ctx, 0, N_PROMPT) == 2, "the callback stops the graph");
        llama_set_abort_callback(ctx, NULL, NULL);
        llama_memory_clear(llama_get_memory(ctx), true);
    }
    float *got = logits_of(ctx);
    check(largest_difference(want, got, &size) == 0.0 && size > 0.0, "as if nothing had happened");
    free(want);
    free(got);
    llama_free(ctx);
}

/* --- short contexts --- */

static void set_short(int n_tokens)
{
    char text[16];

    snprintf(text, sizeof(text), "%d", n_tokens);
    setenv("TQKV_SHORT", text, 1);
}

/* Feeds both contexts alike; by how much what they say next differs, and how large that is. */
static double feed_both(struct llama_context *a, struct llama_context *b, int from, int to,
                        double *size)
{
    check(feed(a, from, to) == 0 && feed(b, from, to) == 0, "both go on");
    return largest_difference(llama_get_logits_ith(a, -1), llama_get_logits_ith(b, -1), size);
}

/* The host's own cells until there are too many of them, codes then, and the same after a clear. */
static void short_to_long(struct llama_context *stock)
{
    enum { LIMIT = N_PROMPT + 2 };
    struct llama_context *ours;
    tqkv_plugin_bytes bytes;
    uint64_t tables = 0; /* bytes that hold no tokens: known once all are gone */
    double size;

    set_short(LIMIT);
    ours = make(1, NULL, NULL);
    for (int round = 0; round < 2; round++) {
        check(feed_both(stock, ours, 0, N_PROMPT, &size) == 0.0 && size > 0.0, "the prompt");
        for (int i = N_PROMPT; i < LIMIT; i++)
            check(feed_both(stock, ours, i, i + 1, &size) == 0.0, "a token within the limit");
        kv_bytes(&bytes, NULL, 0);
        const uint64_t f16 = bytes.f16_held, held = bytes.held;
        check(f16 > 0 && held > f16, "bytes of plain cells");
        check(round == 0 || held - tables < f16 + f16 / 10, "no others");
        double difference = 0.0;
        for (int i = LIMIT; i < N_TOKENS; i++)
            difference = fmax(difference, feed_both(stock, ours, i, i + 1, &size));
        printf("    in codes: difference %.2g of %.2g\n", difference, size);
        check(difference > 0.0 && difference < 0.05 * size, "tokens beyond it");
        kv_bytes(&bytes, NULL, 0);
        check(bytes.f16_held == f16 / LIMIT * N_TOKENS && bytes.plain == 0, "all tokens are there");
        llama_memory_clear(llama_get_memory(stock), true);
        llama_memory_clear(llama_get_memory(ours), true);
        kv_bytes(&bytes, NULL, 0);
        check(bytes.f16_held == 0, "cleared");
        tables = bytes.held;
    }
    llama_free(ours);
}

static uint8_t *save(int limit, size_t *n)
{
    set_short(limit);
    struct llama_context *ctx = make(1, NULL, NULL);
    free(logits_of(ctx));
    *n = llama_state_seq_get_size(ctx, 0);
    uint8_t *bytes = calloc(1, *n + 1);
    check(llama_state_seq_get_data(ctx, bytes, *n, 0) == *n, "saving");
    llama_free(ctx);
    return bytes;
}

/*
 * What was plain for a while has the codes, positions and order of what never was, but for f16's
 * rounding. K of the first layer, with which a state begins: the others depend on attention.
 */
static void same_records(void)
{
    size_t n_want, n_got, n_differ = 0, n_used = 0;
    uint8_t *want = save(0, &n_want), *got = save(N_PROMPT + 2, &n_got);
    const size_t row_bytes = 2 * (size_t)llama_model_n_embd(model) /
                             (size_t)llama_model_n_head(model) *
                             (size_t)llama_model_n_head_kv(model);

    check(n_want == n_got && n_want > N_PROMPT * row_bytes, "states of one size");
    for (size_t i = 0; i < N_PROMPT * row_bytes && n_want == n_got; i++) {
        n_used += want[i] != 0;
        n_differ += want[i] != got[i];
    }
    printf("    %zu of %zu bytes differ\n", n_differ, n_used);
    check(n_used > 1000 && n_differ < n_used / 10, "the same records");
    free(want);
    free(got);
}

/* A prompt beyond the limit is never anything but codes; what has grown short again is codes. */
static void never_short(void)
{
    double size;

    set_short(0);
    float *want = expected(1);
    set_short(N_PROMPT - 1);
    float *got = expected(1);
    check(largest_difference(want, got, &size) == 0.0 && size > 0.0, "a longer prompt");
    struct llama_context *ctx = make(1, NULL, NULL);
    free(logits_of(ctx));
    llama_memory_seq_rm(llama_get_memory(ctx), 0, 0, -1);
    tqkv_plugin_bytes bytes, again;
    kv_bytes(&bytes, NULL, 0);
    check(feed(ctx, 0, 16) == 0, "a short prompt in a cache that was long");
    kv_bytes(&again, NULL, 0);
    check(bytes.held == again.held && bytes.f16_held == again.f16_held, "no plain cells");
    llama_free(ctx);
    free(want);
    free(got);
}

static void test_short(void)
{
    const char *mode = getenv("TQKV_MODE"), *before = getenv("TQKV_SHORT");
    char *kept = before ? strdup(before) : NULL;

    if (!mode || strcmp(mode, "f16") != 0) {
        struct llama_context *stock = make_of(stock_model, 1, NULL, NULL);
        short_to_long(stock);
        llama_free(stock);
        same_records();
    }
    never_short();
    if (kept)
        setenv("TQKV_SHORT", kept, 1);
    else
        unsetenv("TQKV_SHORT");
    free(kept);
}

static struct llama_model *load(const char *path, ggml_backend_dev_t device)
{
    ggml_backend_dev_t devices[] = {device, NULL};
    struct llama_model_params params = llama_model_default_params();

    params.devices = devices;
    return llama_model_load_from_file(path, params);
}

static void quiet(enum ggml_log_level level, const char *line, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(line, stderr);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"many_threads", test_many_threads},
        {"pieces", test_pieces},
        {"abort", test_abort},
        {"short", test_short}};
    const char *plugin = getenv("TQKV_TEST_PLUGIN");

    llama_log_set(quiet, NULL);
    llama_backend_init();
    ggml_backend_reg_t reg = plugin ? ggml_backend_load(plugin) : NULL;
    if (argc < 2 || !reg) {
        printf("needs a model, and TQKV_TEST_PLUGIN\n");
        return 1;
    }
    void *function = ggml_backend_reg_get_proc_address(reg, TQKV_PLUGIN_KV_BYTES);
    memcpy(&kv_bytes, &function, sizeof(function));
    model = load(argv[1], ggml_backend_reg_dev_get(reg, 0));
    stock_model = load(argv[1], NULL);
    if (!model || !stock_model || !kv_bytes) {
        printf("cannot load %s\n", argv[1]);
        return 1;
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (uint32_t i = 0, seed = 1; i < N_TOKENS; i++, seed = seed * 1664525u + 1013904223u)
        tokens[i] = (llama_token)((seed >> 8) % (uint32_t)n_vocab);
    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        if (argc > 2 && strcmp(argv[2], tests[i].name) != 0)
            continue;
        test_failed = 0;
        printf("%s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
        n_failed += test_failed;
        n_passed += !test_failed;
    }
    llama_model_free(model);
    llama_model_free(stock_model);
    llama_backend_free();
    printf("%d passed, %d failed, 0 skipped\n", n_passed, n_failed);
    return n_failed != 0;
}
