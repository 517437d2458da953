/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a real libllama runs the graphs that we take part in: in pieces, with more threads than
 * cores, stopped in the middle.
 *
 *     host_graph model.gguf
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

static struct llama_model *model;
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

static struct llama_context *make(int n_threads, ggml_backend_sched_eval_callback callback,
                                  void *user)
{
    struct llama_context_params params = llama_context_default_params();

    params.n_ctx = 256;
    params.n_batch = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval = callback;
    params.cb_eval_user_data = user;
    return llama_init_from_model(model, params);
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
        {"many_threads", test_many_threads}, {"pieces", test_pieces}, {"abort", test_abort}};
    const char *plugin = getenv("TQKV_TEST_PLUGIN");

    llama_log_set(quiet, NULL);
    llama_backend_init();
    ggml_backend_reg_t reg = plugin ? ggml_backend_load(plugin) : NULL;
    if (argc < 2 || !reg) {
        printf("needs a model, and TQKV_TEST_PLUGIN\n");
        return 1;
    }
    ggml_backend_dev_t devices[] = {ggml_backend_reg_dev_get(reg, 0), NULL};
    struct llama_model_params params = llama_model_default_params();
    params.devices = devices;
    model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        printf("cannot load %s\n", argv[1]);
        return 1;
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (uint32_t i = 0, seed = 1; i < N_TOKENS; i++, seed = seed * 1664525u + 1013904223u)
        tokens[i] = (llama_token)((seed >> 8) % (uint32_t)n_vocab);
    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        test_failed = 0;
        printf("%s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
        n_failed += test_failed;
        n_passed += !test_failed;
    }
    llama_model_free(model);
    llama_backend_free();
    printf("%d passed, %d failed, 0 skipped\n", n_passed, n_failed);
    return n_failed != 0;
}
