/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Progress of long work on stderr: a bar with the time left on a terminal, otherwise a plain line
 * every few seconds. One at a time.
 */
#ifndef TQKV_PROGRESS_H
#define TQKV_PROGRESS_H

#include <stdbool.h>

typedef struct progress {
    const char *phase; /* kept */
    int index, n_phases;
    double total, started, shown;
    bool is_terminal;
    bool is_quiet;
} progress;

/* total: units of work of the phase; set to 0 where it is not known. */
void progress_begin(progress *p, const char *phase, int index, int n_phases, double total);
/* note: what is being done, may be NULL. */
void progress_set(progress *p, double done, const char *note);
/* Clears the line and returns the seconds that the phase took; says them where `tell`. */
double progress_end(progress *p, bool tell);

#endif /* TQKV_PROGRESS_H */
