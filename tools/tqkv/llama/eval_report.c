/* SPDX-License-Identifier: Apache-2.0 */
#include "eval_report.h"

#include <string.h>

#include "json_file.h"

void eval_print_scores(FILE *out, const eval_job *job, const eval_setting *setting,
                       const eval_score *scores)
{
    fprintf(
        out,
        "\n%u tokens of context, fed %u at a time; %zu tokens scored (second half of each piece)\n",
        setting->n_ctx, setting->n_ubatch, job->n_caches ? scores[0].all.n : 0);
    fprintf(out, "%-14s %6s %6s  %10s %9s %9s %8s  %6s  %9s %9s  %10s\n", "cache", "bits", "ratio",
            "KL mean", "+-", "median", "99.9 %", "top-1", "PPL base", "PPL", "held");
    for (size_t i = 0; i < job->n_caches; i++) {
        const eval_score *s = &scores[i];
        const eval_quality *q = &s->all;
        char size[TOOL_SIZE_CHARS];
        const bool has_bytes = s->held_bytes > 0 && s->f16_bytes > 0;
        fprintf(out, "%-14s %6.2f %5.2fx  %10.6f %9.6f %9.6f %8.4f  %5.2f%%  %9.4f %9.4f  %10s\n",
                job->caches[i].label, has_bytes ? 16 * s->held_bytes / s->f16_bytes : 0.0,
                has_bytes ? s->f16_bytes / s->held_bytes : 0.0, q->kl_mean, q->kl_error,
                q->kl_median, q->kl_p999, 100 * q->top1, q->ppl_base, q->ppl,
                has_bytes ? tool_size_text(s->held_bytes, size) : "?");
    }
    fflush(out);
}

static void print_rate(FILE *out, const eval_rate *rate)
{
    char text[64] = "-";
    const spread *s = &rate->rounds;
    if (rate->n_rounds)
        snprintf(text, sizeof(text), "%.2f (%.2f..%.2f)", s->median, s->low, s->high);
    fprintf(out, "  %26s", text);
}

void eval_print_speeds(FILE *out, const eval_speed *speeds, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const eval_speed *s = &speeds[i];
        if (!i || s->depth != s[-1].depth || s->n_threads != s[-1].n_threads)
            fprintf(out,
                    "\nTokens/s with %u threads after %u tokens, median of interleaved rounds "
                    "(quartiles)\n%-14s  %26s  %26s\n",
                    s->n_threads, s->depth, "cache", "decode", "prefill of 512");
        fprintf(out, "%-14s", s->cache);
        print_rate(out, &s->decode);
        print_rate(out, &s->prefill);
        if (s->held_freed > 0) {
            char held[TOOL_SIZE_CHARS], rss[TOOL_SIZE_CHARS];
            fprintf(out, "  claims %s of tokens, the process gave back %s",
                    tool_size_text(s->held_freed, held), tool_size_text(s->rss_freed, rss));
        }
        fputc('\n', out);
    }
    fflush(out);
}

static json_t *texts_json(const eval_job *job, const eval_score *score)
{
    json_t *list = json_array();
    for (size_t i = 0; i < job->n_texts; i++) {
        const eval_quality *q = &score->texts[i];
        const char *path = job->texts[i].path, *slash = strrchr(path, '/');
        json_array_append_new(
            list,
            json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:I}", "text", slash ? slash + 1 : path,
                      "kl_mean", json_real_short(q->kl_mean, 7), "kl_ci95",
                      json_real_short(q->kl_ci95, 4), "kl_median", json_real_short(q->kl_median, 6),
                      "kl_p999", json_real_short(q->kl_p999, 5), "top1",
                      json_real_short(q->top1, 6), "tokens", (json_int_t)q->n));
    }
    return list;
}

static json_t *positions_json(const eval_score *score)
{
    json_t *list = json_array();
    for (size_t i = 0; i < EVAL_POSITIONS; i++) {
        const eval_quality *q = &score->positions[i];
        json_array_append_new(
            list, json_pack("{s:I, s:I, s:o, s:I}", "first", (json_int_t)score->first_position[i],
                            "last", (json_int_t)score->first_position[i + 1] - 1, "kl_mean",
                            json_real_short(q->kl_mean, 7), "tokens", (json_int_t)q->n));
    }
    return list;
}

json_t *eval_scores_json(const eval_job *job, const eval_setting *setting, const eval_score *scores)
{
    json_t *list = json_array();
    for (size_t i = 0; i < job->n_caches; i++) {
        const eval_score *s = &scores[i];
        const eval_quality *q = &s->all;
        const bool has_bytes = s->held_bytes > 0 && s->f16_bytes > 0;
        json_array_append_new(
            list,
            json_pack(
                "{s:s, s:i, s:i, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I, s:I, "
                "s:o, s:o}",
                "cache", job->caches[i].label, "n_ctx", (int)setting->n_ctx, "n_ubatch",
                (int)setting->n_ubatch, "n_scored", (json_int_t)q->n, "kl_mean",
                json_real_short(q->kl_mean, 7), "kl_error", json_real_short(q->kl_error, 4),
                "kl_ci95", json_real_short(q->kl_ci95, 4), "kl_median",
                json_real_short(q->kl_median, 6), "kl_p999", json_real_short(q->kl_p999, 5), "top1",
                json_real_short(q->top1, 6), "ppl_base", json_real_short(q->ppl_base, 8), "ppl",
                json_real_short(q->ppl, 8), "bits",
                has_bytes ? json_real_short(16 * s->held_bytes / s->f16_bytes, 5) : json_null(),
                "ratio", has_bytes ? json_real_short(s->f16_bytes / s->held_bytes, 5) : json_null(),
                "held_bytes", (json_int_t)s->held_bytes, "f16_bytes", (json_int_t)s->f16_bytes,
                "texts", texts_json(job, s), "positions", positions_json(s)));
    }
    return list;
}

/* Adds NAME, NAME_low, NAME_high and NAME_rounds. */
static void add_rate(json_t *row, const char *name, const eval_rate *rate)
{
    const spread *s = &rate->rounds;
    const struct {
        const char *ending;
        double value;
    } parts[] = {{"", s->median}, {"_low", s->low}, {"_high", s->high}};
    char key[32];
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        snprintf(key, sizeof(key), "%s%s", name, parts[i].ending);
        json_object_set_new(row, key,
                            rate->n_rounds ? json_real_short(parts[i].value, 5) : json_null());
    }
    snprintf(key, sizeof(key), "%s_rounds", name);
    json_object_set_new(row, key, json_integer((json_int_t)rate->n_rounds));
}

json_t *eval_speeds_json(const eval_speed *speeds, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        const eval_speed *s = &speeds[i];
        json_t *row =
            json_pack("{s:s, s:i, s:i, s:I, s:I}", "cache", s->cache, "depth", (int)s->depth,
                      "n_threads", (int)s->n_threads, "held_freed_bytes", (json_int_t)s->held_freed,
                      "rss_freed_bytes", (json_int_t)s->rss_freed);
        add_rate(row, "decode", &s->decode);
        add_rate(row, "prefill", &s->prefill);
        json_array_append_new(list, row);
    }
    return list;
}
