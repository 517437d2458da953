/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans for the profiles that are wanted, checked on text that calibration has not read. A plan
 * that loses more than its limit there is solved again with more bits.
 */
#ifndef TQKV_GATE_H
#define TQKV_GATE_H

#include "calib_run.h"

enum {
    GATE_TOKENS = 2048,      /* held back */
    GATE_TEXT_TOKENS = 8192, /* of a text that can spare them */
};

typedef struct gate_plan {
    char name[32]; /* of the profile */
    char *path;    /* that it will be written to; given */
    double asked_bits;
    double limit; /* most KL above the floor; 0: any */

    tqkv_plan *plan;     /* given */
    double bits;         /* budget it was solved for */
    double kl, kl_first; /* on the text held back, of this plan and of the one for asked_bits */
    double kl_floor;     /* of the host itself */
    uint32_t n_checks;   /* 0: kl, kl_first and kl_floor mean nothing */
} gate_plan;

typedef struct gate_job {
    host *h;
    workers *w;
    calib_run *run; /* ready for calib_run_solve */
    const text_tokens *held_back;
    uint32_t context; /* of the profiles */
    gate_plan *plans; /* [n_plans] */
    size_t n_plans;
} gate_job;

/*
 * Cuts a text into what calibration may see and what is held back: nothing where it is too short.
 * Both are borrowed from `text`.
 */
void gate_hold_back(const text_tokens *text, text_tokens *seen, text_tokens *held_back);

/*
 * The plans for asked_bits. index, n_phases: for the progress lines. seconds: what it took.
 * Returns an exit code; says why it failed.
 */
int gate_solve(gate_job *job, int index, int n_phases, double *seconds);

/* Checks those that have a limit. That a plan stays above it is no failure. */
int gate_check(gate_job *job, int index, int n_phases, double *seconds);

/* KL of a checked plan that is the plan's own doing. */
double gate_loss(const gate_plan *p, double kl);
/* Whether a plan was checked and loses more than its limit. */
bool gate_is_exceeded(const gate_plan *p);

#endif /* TQKV_GATE_H */
