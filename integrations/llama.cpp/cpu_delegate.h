/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A CPU backend of our own, for operations on memory that is stored as the host would store it. It
 * starts threads for every graph, so it is the way out, never the way through.
 */
#ifndef TQKV_CPU_DELEGATE_H
#define TQKV_CPU_DELEGATE_H

#include "ggml_abi.h"

typedef struct tqkvp_cpu tqkvp_cpu;

/* NULL where the host gives no backend. */
tqkvp_cpu *tqkvp_cpu_create(void);
void tqkvp_cpu_destroy(tqkvp_cpu *cpu);

/* Queues a node; nodes run in this order. Returns a status of ggml. */
int32_t tqkvp_cpu_add(tqkvp_cpu *cpu, ggml_tensor *node, int n_threads);
/* Runs what was queued. */
int32_t tqkvp_cpu_flush(tqkvp_cpu *cpu, int n_threads);

/* Converts n values between f32 and any type of the host; n is a multiple of the type's block. */
bool tqkvp_cpu_to_f32(tqkvp_cpu *cpu, int32_t type, const void *from, float *to, int64_t n);
bool tqkvp_cpu_from_f32(tqkvp_cpu *cpu, int32_t type, const float *from, void *to, int64_t n);

#endif /* TQKV_CPU_DELEGATE_H */
