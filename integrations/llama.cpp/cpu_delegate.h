/* SPDX-License-Identifier: Apache-2.0 */
/* A CPU backend of our own, for all that the host's CPU code computes. */
#ifndef TQKV_CPU_DELEGATE_H
#define TQKV_CPU_DELEGATE_H

#include "ggml_abi.h"

typedef struct tqkvp_cpu tqkvp_cpu;

/* One thread until told otherwise. NULL where the host gives no backend. */
tqkvp_cpu *tqkvp_cpu_create(void);
void tqkvp_cpu_destroy(tqkvp_cpu *cpu);

/*
 * Threads of later graphs. Where the host's CPU code has threads of its own, some are kept for it,
 * or it would start new ones for every graph. are_alone: nobody else computes between our graphs,
 * so that they may wait for the next one awake.
 */
void tqkvp_cpu_set_threads(tqkvp_cpu *cpu, int n_threads, bool are_alone);
void tqkvp_cpu_set_abort(tqkvp_cpu *cpu, bool (*callback)(void *data), void *data);

/* Computes a graph of the host, or one node. Returns a status of ggml. */
int32_t tqkvp_cpu_graph(tqkvp_cpu *cpu, struct ggml_cgraph *graph);
int32_t tqkvp_cpu_node(tqkvp_cpu *cpu, ggml_tensor *node);

/* Converts n values between f32 and any type of the host; n is a multiple of the type's block. */
bool tqkvp_cpu_to_f32(tqkvp_cpu *cpu, int32_t type, const void *from, float *to, int64_t n);
bool tqkvp_cpu_from_f32(tqkvp_cpu *cpu, int32_t type, const float *from, void *to, int64_t n);

#endif /* TQKV_CPU_DELEGATE_H */
