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

void eval_print_speeds(FILE *out, const eval_job *job, const eval_speed *speeds)
{
    fprintf(out,
            "\nTokens/s with %u threads; decode at %u tokens of context, median of interleaved "
            "rounds (least..most)\n",
            host_n_threads(job->h), speeds[0].depth);
    fprintf(out, "%-14s %9s  %s\n", "cache", "prefill", "decode");
    for (size_t i = 0; i < job->n_caches; i++) {
        const eval_speed *s = &speeds[i];
        char prefill[32] = "-";
        if (s->prefill > 0)
            snprintf(prefill, sizeof(prefill), "%.1f", s->prefill);
        fprintf(out, "%-14s %9s  %7.2f (%.2f..%.2f)", job->caches[i].label, prefill, s->decode,
                s->decode_least, s->decode_most);
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

json_t *eval_speeds_json(const eval_job *job, const eval_speed *speeds)
{
    json_t *list = json_array();
    for (size_t i = 0; i < job->n_caches; i++) {
        const eval_speed *s = &speeds[i];
        json_array_append_new(
            list,
            json_pack(
                "{s:s, s:i, s:i, s:o, s:o, s:o, s:o, s:I, s:I, s:I}", "cache", job->caches[i].label,
                "depth", (int)s->depth, "n_threads", (int)host_n_threads(job->h), "prefill",
                s->prefill > 0 ? json_real_short(s->prefill, 5) : json_null(), "decode",
                json_real_short(s->decode, 5), "decode_least", json_real_short(s->decode_least, 5),
                "decode_most", json_real_short(s->decode_most, 5), "held_bytes",
                (json_int_t)s->held_bytes, "held_freed_bytes", (json_int_t)s->held_freed,
                "rss_freed_bytes", (json_int_t)s->rss_freed));
    }
    return list;
}
