/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's threads, while they are within one node of ours. The host sends all of them into a
 * node and lets none go on to the next before the last one has left. One of them leads: it computes
 * the node and hands out tasks, one at a time from a counter. The others help until the leader is
 * through. Nobody sleeps: what they would miss is a few microseconds.
 */
#ifndef TQKV_NODE_TEAM_H
#define TQKV_NODE_TEAM_H

#include <stdatomic.h>

#include <turboquant/types.h>

typedef struct tqkvp_team {
    tqkv_parallel parallel;
    atomic_uint epoch;      /* odd while there are tasks */
    atomic_uint active;     /* helpers that look at them */
    atomic_uint n_finished; /* the leader is through with all nodes below this number */
    atomic_size_t next;
    size_t n_tasks;
    tqkv_task_fn *fn;
    void *task;
} tqkvp_team;

void tqkvp_team_init(tqkvp_team *team);

/*
 * No thread is within a node: the next graph begins. Its nodes have numbers that grow; the host may
 * leave some out.
 */
void tqkvp_team_reset(tqkvp_team *team);

/* What the leader computes with: alone, or with the helpers of the node that it is in. */
const tqkv_parallel *tqkvp_team_parallel(const tqkvp_team *team);

/* The leader enters a node with n_threads threads in it, itself included; it is through. */
void tqkvp_team_begin(tqkvp_team *team, int n_threads);
void tqkvp_team_end(tqkvp_team *team, unsigned node);

/* Any other thread of the node, worker 1, 2, ...: returns when the leader is through. */
void tqkvp_team_help(tqkvp_team *team, unsigned node, size_t worker);

#endif /* TQKV_NODE_TEAM_H */
