/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The check is what `tqkv eval` does with one piece of 2048 tokens. Nothing that a plan is made of
 * depends on the number of threads, but the last digits of the host's logits may, and with them the
 * KL that is compared with a limit: a plan is another one only if it lies on the very edge.
 */
#include "gate.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "eval_types.h"
#include "gate_limit.h"
#include "interrupt.h"
#include "progress.h"

enum { MICRO_BATCH_TOKENS = 512, FILE_NAME_CHARS = 32 };

void gate_hold_back(const text_tokens *text, text_tokens *seen, text_tokens *held_back)
{
    const size_t n = text->n < GATE_TEXT_TOKENS ? 0 : GATE_TOKENS;
    *seen = (text_tokens){text->path, text->tokens, text->n - n};
    *held_back = (text_tokens){text->path, text->tokens + seen->n, n};
}

double gate_loss(const gate_plan *p, double kl)
{
    return kl > p->kl_floor ? kl - p->kl_floor : 0;
}

static bool is_met(const gate_plan *p)
{
    return p->kl - p->kl_floor <= p->limit; /* not where a KL is not a number */
}

bool gate_is_exceeded(const gate_plan *p)
{
    return p->n_checks && !is_met(p);
}

static int solve(const gate_job *job, gate_plan *p, double bits)
{
    tqkv_profile profile;
    tqkv_plan *plan;
    tqkv_profile_init(&profile, p->name, bits, job->context);
    const int rc = calib_run_solve(job->run, &profile, &plan);
    if (rc == TOOL_OK) {
        tqkv_plan_destroy(p->plan);
        p->plan = plan;
        p->bits = bits;
    }
    return rc;
}

int gate_solve(gate_job *job, int index, int n_phases, double *seconds)
{
    progress bar;
    int rc = TOOL_OK;
    progress_begin(&bar, "solve", index, n_phases, 0);
    for (size_t i = 0; i < job->n_plans && rc == TOOL_OK; i++)
        rc = solve(job, &job->plans[i], job->plans[i].asked_bits);
    *seconds = progress_end(&bar, rc == TOOL_OK);
    return rc;
}

/* ---- one pass -------------------------------------------------------------------------------- */

typedef struct trial {
    eval_job eval;
    gate_plan *plans[EVAL_CACHES_MAX]; /* of each cache; NULL: the floor's */
    int files[EVAL_CACHES_MAX];        /* descriptors; -1: none */
    char names[EVAL_CACHES_MAX][FILE_NAME_CHARS];
} trial;

/*
 * The plugin reads plans from files. This one has lost its name before it is used, so that nothing
 * is left of it however the program ends. Returns a descriptor, or -1 after a message.
 */
static int open_nameless(const gate_plan *p)
{
    char *path = tool_format("%s.%ld.check", p->path, (long)getpid());
    interrupt_hold();
    const tqkv_status status = tqkv_plan_save(p->plan, path, tool_logger());
    const int file = status == TQKV_OK ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    const int error = errno;
    unlink(path);
    interrupt_release();
    if (status != TQKV_OK)
        tool_error("plan to check %s: %s", path, tqkv_status_text(status));
    else if (file < 0)
        tool_error("plan to check %s: %s", path, strerror(error));
    free(path);
    return file;
}

/* p: NULL for the floor. */
static int add_cache(trial *t, gate_plan *p)
{
    const size_t i = t->eval.n_caches++;
    eval_cache *cache = &t->eval.caches[i];
    t->plans[i] = p;
    t->files[i] = p ? open_nameless(p) : -1;
    if (p && t->files[i] < 0)
        return TOOL_FAILED;
    snprintf(cache->label, sizeof(cache->label), "%s", p ? p->name : "f16");
    snprintf(t->names[i], sizeof(t->names[i]), "/proc/self/fd/%d", t->files[i]);
    cache->cache = p ? (host_cache){.mode = "plan", .plan_path = t->names[i]}
                     : (host_cache){.stock_type = "f16"};
    return TOOL_OK;
}

static void take_scores(gate_job *job, const trial *t, const eval_score *scores)
{
    for (size_t i = 0; i < t->eval.n_caches; i++) {
        gate_plan *p = t->plans[i];
        const double kl = scores[i].all.kl_mean;
        for (size_t j = 0; j < job->n_plans && !p; j++)
            job->plans[j].kl_floor = kl;
        if (!p)
            continue;
        p->kl = kl;
        p->kl_first = p->n_checks++ ? p->kl_first : kl;
    }
}

/* Measures the plans that wait for it, and the floor the first time. */
static int measure(gate_job *job, const bool *waits, bool is_first, int index, int n_phases)
{
    eval_score scores[EVAL_CACHES_MAX] = {0};
    text_tokens text = *job->held_back;
    trial *t = tool_alloc(1, sizeof(*t));
    t->eval = (eval_job){.h = job->h,
                         .w = job->w,
                         .texts = &text,
                         .n_texts = 1,
                         .n_pieces = 1,
                         .phase = is_first ? "check" : "check again",
                         .step = index - 1,
                         .n_steps = n_phases};
    int rc = is_first ? add_cache(t, NULL) : TOOL_OK;
    for (size_t i = 0; i < job->n_plans && rc == TOOL_OK; i++) {
        if (waits[i])
            rc = add_cache(t, &job->plans[i]);
    }
    if (rc == TOOL_OK)
        rc = eval_score_run(&t->eval, &(eval_setting){GATE_TOKENS, MICRO_BATCH_TOKENS}, scores);
    if (rc == TOOL_OK)
        take_scores(job, t, scores);
    for (size_t i = 0; i < t->eval.n_caches; i++) {
        eval_score_deinit(&scores[i]);
        if (t->files[i] >= 0)
            close(t->files[i]);
    }
    free(t);
    return rc;
}

/* ---- all passes ------------------------------------------------------------------------------ */

static double bits_of(const gate_plan *p)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(p->plan, &info);
    return info.bits_total;
}

/* Solves a plan that was measured again if that can help. waits: out, whether it did. */
static int back_off(const gate_job *job, gate_plan *p, bool *waits)
{
    const double before = bits_of(p);
    const double bits =
        is_met(p) ? 0 : gate_next_bits(p->asked_bits, p->bits, (p->kl - p->kl_floor) / p->limit);
    *waits = false;
    if (bits <= 0)
        return TOOL_OK;
    const int rc = solve(job, p, bits);
    *waits = rc == TOOL_OK && bits_of(p) > before; /* widths end at 8 bits */
    return rc;
}

int gate_check(gate_job *job, int index, int n_phases, double *seconds)
{
    const double started = tool_seconds();
    bool *waits = tool_alloc(job->n_plans, sizeof(*waits)), is_first = true, any = false;
    int rc = TOOL_OK;
    for (size_t i = 0; i < job->n_plans; i++) {
        waits[i] = job->plans[i].limit > 0;
        any = any || waits[i];
    }
    while (any && rc == TOOL_OK) {
        rc = measure(job, waits, is_first, index, n_phases);
        is_first = any = false;
        for (size_t i = 0; i < job->n_plans && rc == TOOL_OK; i++) {
            if (waits[i])
                rc = back_off(job, &job->plans[i], &waits[i]);
            any = any || waits[i];
        }
    }
    free(waits);
    *seconds = tool_seconds() - started;
    return rc;
}
