/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv calibrate`: makes plans for a model. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "calib_run.h"
#include "f32_weights.h"
#include "gate.h"
#include "gate_limit.h"
#include "gate_report.h"
#include "interrupt.h"
#include "json_file.h"
#include "output_file.h"
#include "plugin_file.h"
#include "sensitivity.h"
#include "tool.h"

enum { PROFILES_MAX = 8 };
enum { WEIGHTS, OBSERVE, TRANSFORMS, SENSITIVITY, SOLVE, CHECK, N_PHASES };

/* More of either tells more and takes longer: docs/QUALITY.md has what probes gain. */
enum { TOKENS_DEFAULT = 16384, PROBES_DEFAULT = 16, CONTEXT_DEFAULT = 8192 };
#define PROBE_BITS_DEFAULT 1.5

/* As large as llama.cpp's q4_0. */
#define NEAR_LOSSLESS "near-lossless"
#define NEAR_LOSSLESS_BITS 4.5

/* The text that comes with tqkv has 25000 tokens or so, and repeats a tenth of them. */
enum { TOKENS_ADVISED = 8192 };
#define REPEATED_MAX 0.5

typedef struct phases {
    bool has_f32;
    int n;
    double seconds[N_PHASES];
} phases;

typedef struct calibrate_options {
    const char *model, *output, *plugin;
    tool_list texts, names;
    uint32_t n_threads, n_tokens, n_probes, context;
    double probe_bits, max_kl;
    bool has_max_kl, keeps_weights, is_json, is_verbose;
    gate_plan plans[PROFILES_MAX];
    size_t n_plans;
} calibrate_options;

static void print_help(void)
{
    printf(
        "Usage: tqkv calibrate MODEL.gguf [-o PLAN.tqkv] [--profile 5x,8x] [options]\n\n"
        "Runs the model on text and writes how its KV cache is best stored. Done once per "
        "model.\n\n"
        "  -o, --output FILE   plan to write (default: beside the model, .tqkv instead of .gguf;\n"
        "                      profiles other than 5x: .NAME.tqkv); a folder where it ends in /\n"
        "      --profile LIST  sizes: 5x is 3.2 bits per value, 8x is 2, Nx is 16/N, near-lossless\n"
        "                      is 4.5 (default: 5x)\n"
        "      --bits B        the same as bits per value, everything counted\n"
        "      --context N     tokens at which the size is counted (default: %d)\n"
        "      --text FILE     text to use instead of the mix of languages and code that comes\n"
        "                      with tqkv; may be repeated\n"
        "      --tokens N      tokens of it to use (default: %d)\n"
        "      --probes N      pieces of %d tokens that measure how much each layer matters\n"
        "                      (default: %d)\n"
        "      --probe-bits B  how coarse a layer is made for that (default: %g)\n"
        "      --max-kl X      KL divergence, above the host's own, that a plan may have on the last\n"
        "                      %d tokens of the text, which are held back; a plan above it gets up\n"
        "                      to 40 %% more bits; 0: any (default: by bits; 0.03 for 5x, 0.12 for 8x)\n"
        "      --weights f32|file  measure with quantised weights in f32 (default; a temporary file\n"
        "                      beside the plan), which tells better what layers lose, or as they are;\n"
        "                      as they are also where f32 would take more than half of the memory\n"
        "  -t, --threads N     threads (default: all processors)\n"
        "      --plugin FILE   libggml-turboquant.so (default: beside tqkv, or TQKV_PLUGIN)\n"
        "      --json          print what was done as JSON\n"
        "      --verbose       show llama.cpp's log\n",
        CONTEXT_DEFAULT, TOKENS_DEFAULT, SENSITIVITY_OLD_TOKENS, PROBES_DEFAULT, PROBE_BITS_DEFAULT,
        GATE_TOKENS);
}

static int parse_option(calibrate_options *o, int option, char **argv)
{
    double bits;
    int rc;
    switch (option) {
    case 'o':
        o->output = optarg;
        return *optarg ? TOOL_OK : tool_usage("-o: empty file name");
    case 'f':
        return tool_list_add(&o->names, "--profile", optarg);
    case 'b':
        rc = tool_parse_real("--bits", optarg, 0.5, 16, &bits);
        if (rc == TOOL_OK)
            tool_list_push(&o->names, optarg);
        return rc;
    case 'c':
        return tool_parse_count("--context", optarg, 64, 1 << 24, &o->context);
    case 'x':
        tool_list_push(&o->texts, optarg);
        return TOOL_OK;
    case 'n':
        return tool_parse_count("--tokens", optarg, 512, 1 << 26, &o->n_tokens);
    case 'r':
        return tool_parse_count("--probes", optarg, 1, 64, &o->n_probes);
    case 'q':
        return tool_parse_real("--probe-bits", optarg, 0.5, 8, &o->probe_bits);
    case 'm':
        o->has_max_kl = true;
        return tool_parse_real("--max-kl", optarg, 0, 100, &o->max_kl);
    case 'w':
        o->keeps_weights = strcmp(optarg, "file") == 0;
        return o->keeps_weights || strcmp(optarg, "f32") == 0
                   ? TOOL_OK
                   : tool_usage("--weights: f32 or file, not '%s'", optarg);
    case 't':
        return tool_parse_count("-t", optarg, 1, TOOL_THREADS_MAX, &o->n_threads);
    case 'g':
        o->plugin = optarg;
        return TOOL_OK;
    case 'j':
        o->is_json = true;
        return TOOL_OK;
    case 'v':
        o->is_verbose = true;
        return TOOL_OK;
    default:
        return tool_bad_option(argv, option);
    }
}

/* A name, "5x", or a number of bits. */
static int read_profile(const char *name, gate_plan *out)
{
    char *end;
    const double number = strtod(name, &end);
    const bool is_ratio = end != name && strcmp(end, "x") == 0;
    const bool is_near_lossless = strcmp(name, NEAR_LOSSLESS) == 0;
    out->asked_bits = is_near_lossless           ? NEAR_LOSSLESS_BITS
                      : is_ratio && number > 0 ? 16 / number
                                               : number;
    if (!is_near_lossless &&
        (end == name || (*end && !is_ratio) || !(out->asked_bits >= 0.5 && out->asked_bits <= 16)))
        return tool_usage("profile '%s': 5x, 8x, %s or bits per value such as 3.2 are understood",
                          name, NEAR_LOSSLESS);
    snprintf(out->name, sizeof(out->name), "%s", name);
    return TOOL_OK;
}

/* Where a profile's plan goes. Given. */
static char *output_path(const calibrate_options *o, const char *profile)
{
    const size_t n = o->output ? strlen(o->output) : 0;
    if (n && o->output[n - 1] != '/')
        return tool_copy(o->output);
    const char *slash = strrchr(o->model, '/');
    char *ending =
        strcmp(profile, "5x") == 0 ? tool_copy(".tqkv") : tool_format(".%s.tqkv", profile);
    char *name = tool_replace_ending(n && slash ? slash + 1 : o->model, ".gguf", ending);
    char *path = tool_format("%s%s", n ? o->output : "", name);
    free(name);
    free(ending);
    return path;
}

static int name_outputs(calibrate_options *o)
{
    if (!o->names.n)
        tool_list_push(&o->names, "5x");
    if (o->output && o->names.n > 1 && o->output[strlen(o->output) - 1] != '/')
        return tool_usage(
            "-o names one file, %zu profiles are asked for; give a folder (with / at the end)",
            o->names.n);
    for (size_t i = 0; i < o->names.n; i++) {
        if (i == PROFILES_MAX)
            return tool_usage("more than %d profiles", PROFILES_MAX);
        gate_plan *p = &o->plans[i];
        const int rc = read_profile(o->names.items[i], p);
        if (rc != TOOL_OK)
            return rc;
        p->path = output_path(o, p->name);
        o->n_plans = i + 1;
    }
    return TOOL_OK;
}

/* The text that comes with tqkv. Given; NULL after a message. */
static char *shipped_text(void)
{
    char *dir = tool_program_dir();
    char *installed = tool_format("%s/../share/turboquant/calibration/mixed.txt", dir);
    free(dir);
    if (access(installed, R_OK) == 0)
        return installed;
    free(installed);
    if (access(TQKV_CALIBRATION_TEXT, R_OK) == 0)
        return tool_copy(TQKV_CALIBRATION_TEXT);
    tool_error("the text that comes with tqkv is missing (%s); name one with --text",
               TQKV_CALIBRATION_TEXT);
    return NULL;
}

static int parse(calibrate_options *o, int argc, char **argv)
{
    static const struct option options[] = {{"help", no_argument, NULL, 'h'},
                                            {"output", required_argument, NULL, 'o'},
                                            {"profile", required_argument, NULL, 'f'},
                                            {"bits", required_argument, NULL, 'b'},
                                            {"context", required_argument, NULL, 'c'},
                                            {"text", required_argument, NULL, 'x'},
                                            {"tokens", required_argument, NULL, 'n'},
                                            {"probes", required_argument, NULL, 'r'},
                                            {"probe-bits", required_argument, NULL, 'q'},
                                            {"max-kl", required_argument, NULL, 'm'},
                                            {"weights", required_argument, NULL, 'w'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"plugin", required_argument, NULL, 'g'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"verbose", no_argument, NULL, 'v'},
                                            {0}};
    int option;
    while ((option = getopt_long(argc, argv, ":ho:t:", options, NULL)) != -1) {
        if (option == 'h') {
            print_help();
            return TOOL_OK;
        }
        const int rc = parse_option(o, option, argv);
        if (rc != TOOL_OK)
            return rc;
    }
    if (optind == argc)
        return tool_usage("which model?");
    if (optind + 1 < argc)
        return tool_usage("one model at a time; '%s' is one too many", argv[optind + 1]);
    o->model = argv[optind];
    if (!o->n_threads)
        o->n_threads = tool_n_processors();
    return name_outputs(o);
}

static int read_all_texts(host *h, const calibrate_options *o, text_tokens *out)
{
    *out = (text_tokens){.path = o->texts.n ? o->texts.items[0] : ""};
    for (size_t i = 0; i < o->texts.n; i++) {
        text_tokens part;
        const int rc = text_tokens_read(h, o->texts.items[i], &part);
        if (rc != TOOL_OK)
            return rc;
        out->tokens = tool_grow(out->tokens, out->n + part.n, sizeof(*out->tokens));
        if (part.n)
            memcpy(out->tokens + out->n, part.tokens, part.n * sizeof(*part.tokens));
        out->n += part.n;
        text_tokens_free(&part);
    }
    return TOOL_OK;
}

/* A plan fits what it has seen. */
static void warn_about_text(const text_tokens *text)
{
    const double repeated = text_repeated(text);
    if (text->n < TOKENS_ADVISED)
        tool_note("the text has %zu tokens; with fewer than %d a plan loses more on other texts", text->n,
                  TOKENS_ADVISED);
    if (repeated > REPEATED_MAX)
        tool_note("%.0f %% of the text repeats itself; a plan fits what it has seen and loses more on other texts",
                  100 * repeated);
}

/* Written when all is done, so that an interrupted calibration leaves nothing. */
static int save(const calibrate_options *o)
{
    tqkv_status status = TQKV_OK;
    int rc = TOOL_OK;
    interrupt_hold();
    for (size_t i = 0; i < o->n_plans && rc == TOOL_OK; i++) {
        status = tqkv_plan_save(o->plans[i].plan, o->plans[i].path, tool_logger());
        if (status != TQKV_OK)
            rc = tool_error("output %s: %s", o->plans[i].path, tqkv_status_text(status));
    }
    interrupt_release();
    for (size_t i = 0; i < o->n_plans && rc == TOOL_OK; i++)
        gate_report_print(&o->plans[i], o->is_json ? stderr : stdout);
    return rc;
}

static int print_json(const calibrate_options *o, const gguf_head *model, calib_run *run,
                      const double seconds[N_PHASES])
{
    static const char *const names[N_PHASES] = {"weights",     "observe", "transforms",
                                                "sensitivity", "solve",   "check"};
    json_t *plans = json_array(), *times = json_object(), *k = json_array(), *v = json_array();
    for (size_t i = 0; i < o->n_plans; i++)
        json_array_append_new(plans, gate_report_json(&o->plans[i]));
    for (size_t i = 0; i < N_PHASES; i++)
        json_object_set_new(times, names[i], json_real_short(seconds[i], 4));
    for (uint32_t i = 0; i < model->n_layers; i++) {
        json_array_append_new(k, json_real_short(calib_run_kl(run, i, TQKV_SIDE_K), 5));
        json_array_append_new(v, json_real_short(calib_run_kl(run, i, TQKV_SIDE_V), 5));
    }
    return json_file_write("-", json_pack("{s:s, s:s, s:I, s:o, s:o, s:o, s:o}", "model",
                                          model->name, "arch", model->arch, "n_tokens",
                                          (json_int_t)calib_run_n_tokens(run), "plans", plans,
                                          "seconds", times, "k_kl", k, "v_kl", v));
}

static bool set_limits(calibrate_options *o, const text_tokens *held_back)
{
    const bool is_wanted = !o->has_max_kl || o->max_kl > 0;
    if (is_wanted && !held_back->n)
        tool_note("the text has fewer than %d tokens: none are held back to check plans on",
                  GATE_TEXT_TOKENS);
    for (size_t i = 0; i < o->n_plans && is_wanted && held_back->n; i++)
        o->plans[i].limit = o->has_max_kl ? o->max_kl : gate_limit(o->plans[i].asked_bits);
    return is_wanted && held_back->n;
}

/* Until host_use_weights again. */
static int take_f32(const calibrate_options *o, host *h, f32_weights *f32, int n_phases,
                    double *seconds)
{
    progress bar;
    progress_begin(&bar, "weights in f32", 1, n_phases, 0);
    const int rc = f32_weights_open(o->model, o->plans[0].path, o->n_threads, f32);
    *seconds = progress_end(&bar, rc == TOOL_OK);
    if (rc == TOOL_OK)
        host_use_weights(h, f32->path);
    return rc;
}

/* All that looks at how layers react. The check then is of the model as it is. */
static int measure(const calibrate_options *o, const gguf_head *model, gate_job *gate,
                   const text_tokens *seen, phases *p)
{
    const calib_options options = {.model_path = o->model,
                                   .n_tokens = o->n_tokens,
                                   .n_probes = o->n_probes,
                                   .probe_bits = o->probe_bits};
    f32_weights f32 = {.file = -1};
    int rc = p->has_f32 ? take_f32(o, gate->h, &f32, p->n, &p->seconds[WEIGHTS]) : TOOL_OK;
    const int done = p->has_f32;
    if (rc == TOOL_OK)
        rc = calib_run_create(gate->h, gate->w, model, seen, &options, &gate->run);
    if (rc == TOOL_OK)
        rc = calib_run_observe(gate->run, done + 1, p->n, &p->seconds[OBSERVE]);
    if (rc == TOOL_OK)
        rc = calib_run_prepare(gate->run, done + 2, p->n, &p->seconds[TRANSFORMS]);
    if (rc == TOOL_OK)
        rc = calib_run_perturb(gate->run, done + 3, p->n, &p->seconds[SENSITIVITY]);
    host_use_weights(gate->h, NULL);
    f32_weights_close(&f32);
    return rc;
}

static int run_phases(calibrate_options *o, const gguf_head *model, gate_job *gate,
                      const text_tokens *seen)
{
    const bool is_checked = set_limits(o, gate->held_back);
    const bool has_f32 = !o->keeps_weights && f32_weights_help(o->model);
    phases p = {.has_f32 = has_f32, .n = N_PHASES - !has_f32 - !is_checked};
    double sum = 0;
    int rc = measure(o, model, gate, seen, &p);
    if (rc == TOOL_OK)
        rc = gate_solve(gate, 4 + has_f32, p.n, &p.seconds[SOLVE]);
    if (rc == TOOL_OK)
        rc = gate_check(gate, 5 + has_f32, p.n, &p.seconds[CHECK]);
    if (rc == TOOL_OK)
        rc = save(o);
    for (size_t i = 0; i < N_PHASES; i++)
        sum += p.seconds[i];
    if (rc == TOOL_OK)
        fprintf(stderr, "in all %.0f s\n", sum);
    if (rc == TOOL_OK && o->is_json)
        rc = print_json(o, model, gate->run, p.seconds);
    return rc;
}

/* What can be wrong is found before the work. */
static int check_inputs(calibrate_options *o, gguf_head *model, char **plugin)
{
    int rc = gguf_head_read(o->model, model);
    for (size_t i = 0; i < o->n_plans && rc == TOOL_OK; i++)
        rc = output_file_check(o->plans[i].path);
    if (rc == TOOL_OK && !o->texts.n) {
        char *text = shipped_text();
        if (text)
            tool_list_push(&o->texts, text);
        free(text);
        rc = o->texts.n ? TOOL_OK : TOOL_FAILED;
    }
    for (size_t i = 0; i < o->texts.n && rc == TOOL_OK; i++) {
        if (access(o->texts.items[i], R_OK) != 0)
            rc = tool_error("text %s: %s", o->texts.items[i], strerror(errno));
    }
    if (rc == TOOL_OK) {
        *plugin = plugin_file_find(o->plugin, 1);
        rc = *plugin ? TOOL_OK : TOOL_FAILED;
    }
    return rc;
}

static int calibrate(calibrate_options *o)
{
    gguf_head *model = tool_alloc(1, sizeof(*model));
    char *plugin = NULL;
    host *h = NULL;
    gate_job gate;
    text_tokens text = {0}, seen, held_back;
    int rc = check_inputs(o, model, &plugin);
    if (rc == TOOL_OK)
        rc = host_open(&(host_options){.model_path = o->model,
                                       .plugin_path = plugin,
                                       .n_threads = o->n_threads,
                                       .is_verbose = o->is_verbose},
                       &h);
    if (rc == TOOL_OK)
        rc = read_all_texts(h, o, &text);
    if (rc == TOOL_OK) {
        warn_about_text(&text);
        gate_hold_back(&text, &seen, &held_back);
        gate = (gate_job){.h = h,
                          .w = workers_create(o->n_threads),
                          .held_back = &held_back,
                          .context = o->context,
                          .plans = o->plans,
                          .n_plans = o->n_plans};
        rc = run_phases(o, model, &gate, &seen);
        calib_run_destroy(gate.run);
        workers_destroy(gate.w);
    }
    text_tokens_free(&text);
    host_close(h);
    free(plugin);
    free(model);
    return rc;
}

int cmd_calibrate(int argc, char **argv)
{
    calibrate_options o = {.n_tokens = TOKENS_DEFAULT,
                           .n_probes = PROBES_DEFAULT,
                           .context = CONTEXT_DEFAULT,
                           .probe_bits = PROBE_BITS_DEFAULT};
    int rc = parse(&o, argc, argv);
    if (rc == TOOL_OK && o.model) {
        interrupt_install();
        rc = calibrate(&o);
    }
    for (size_t i = 0; i < PROFILES_MAX; i++) {
        free(o.plans[i].path);
        tqkv_plan_destroy(o.plans[i].plan);
    }
    tool_list_free(&o.texts);
    tool_list_free(&o.names);
    return rc;
}
