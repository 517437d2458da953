/* SPDX-License-Identifier: Apache-2.0 */
#include "in_turn.h"

#include <time.h>

#include "tool.h"

/* Threads of the one before spin a little longer than their work: OpenMP's some milliseconds. */
static void let_others_sleep(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
}

static double time_one(const in_turn *subject, double least_seconds)
{
    size_t n = 0;
    let_others_sleep();
    if (subject->begin)
        subject->begin(subject->user);
    subject->run(subject->user);
    const double started = tool_seconds();
    double taken;
    do {
        subject->run(subject->user);
        n++;
        taken = tool_seconds() - started;
    } while (taken < least_seconds);
    if (subject->end)
        subject->end(subject->user);
    return taken / (double)n;
}

void in_turn_time(in_turn *subjects, size_t n_subjects, size_t n_rounds, double least_seconds)
{
    for (size_t round = 0; round < n_rounds; round++)
        for (size_t i = 0; i < n_subjects; i++)
            subjects[i].seconds[round] = time_one(&subjects[i], least_seconds);
}
