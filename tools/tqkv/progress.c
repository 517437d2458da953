/* SPDX-License-Identifier: Apache-2.0 */
#include "progress.h"

#include <stdio.h>
#include <string.h>

#include "tool.h"

#define BAR_CHARS 24
#define TERMINAL_PERIOD 0.1 /* seconds between two drawings */
#define PLAIN_PERIOD 5.0

void progress_begin(progress *p, const char *phase, int index, int n_phases, double total)
{
    const double now = tool_seconds();
    *p = (progress){.phase = phase,
                    .index = index,
                    .n_phases = n_phases,
                    .total = total,
                    .started = now,
                    .shown = now - TERMINAL_PERIOD,
                    .is_terminal = tool_is_terminal(stderr)};
    if (!p->is_terminal)
        p->shown = now;
    progress_set(p, 0, NULL);
}

static void time_text(double seconds, char *buffer, size_t n)
{
    const long whole = (long)(seconds + 0.5);
    if (whole < 3600)
        snprintf(buffer, n, "%ld:%02ld", whole / 60, whole % 60);
    else
        snprintf(buffer, n, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
}

void progress_set(progress *p, double done, const char *note)
{
    const double now = tool_seconds();
    if (p->is_quiet || now - p->shown < (p->is_terminal ? TERMINAL_PERIOD : PLAIN_PERIOD))
        return;
    p->shown = now;

    const double share = p->total > 0 && done < p->total ? done / p->total
                         : p->total > 0                  ? 1.0
                                                         : 0.0;
    char left[32] = "";
    if (share > 0.01) {
        char clock_text[24];
        time_text((now - p->started) * (1 - share) / share, clock_text, sizeof(clock_text));
        snprintf(left, sizeof(left), ", %s left", clock_text);
    }
    char phase[96] = "";
    if (p->n_phases > 1)
        snprintf(phase, sizeof(phase), "%d/%d ", p->index, p->n_phases);
    if (!p->is_terminal) {
        fprintf(stderr, "%s%s %3.0f %%%s%s%s\n", phase, p->phase, 100 * share, left,
                note ? ", " : "", note ? note : "");
        return;
    }
    char bar[BAR_CHARS + 1];
    memset(bar, '.', BAR_CHARS);
    memset(bar, '#', (size_t)(share * BAR_CHARS));
    bar[BAR_CHARS] = '\0';
    fprintf(stderr, "\r\033[K%s%s [%s] %3.0f %%%s%s%s", phase, p->phase, bar, 100 * share, left,
            note ? ", " : "", note ? note : "");
    fflush(stderr);
}

double progress_end(progress *p, bool tell)
{
    const double seconds = tool_seconds() - p->started;
    if (p->is_quiet)
        return seconds;
    if (p->is_terminal)
        fputs("\r\033[K", stderr);
    if (tell) {
        if (p->n_phases > 1)
            fprintf(stderr, "%d/%d ", p->index, p->n_phases);
        fprintf(stderr, "%s: %.1f s\n", p->phase, seconds);
    }
    fflush(stderr);
    return seconds;
}
