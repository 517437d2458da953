/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Timing of things that are compared. All of them run once, then all of them once more, and so on,
 * so that what else the machine does hits all alike.
 */
#ifndef TQKV_IN_TURN_H
#define TQKV_IN_TURN_H

#include <stddef.h>

enum { IN_TURN_ROUNDS_MAX = 101 };

typedef struct in_turn {
    void *user;
    void (*begin)(void *user);          /* before each round, not timed; may be NULL */
    void (*run)(void *user);            /* timed */
    void (*end)(void *user);            /* after each round, not timed; may be NULL */
    double seconds[IN_TURN_ROUNDS_MAX]; /* out: of one run, by round */
} in_turn;

/*
 * Each round of a subject is one run that is not timed and then as many as take least_seconds,
 * at least one. n_rounds <= IN_TURN_ROUNDS_MAX.
 */
void in_turn_time(in_turn *subjects, size_t n_subjects, size_t n_rounds, double least_seconds);

#endif /* TQKV_IN_TURN_H */
