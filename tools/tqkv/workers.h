/* SPDX-License-Identifier: Apache-2.0 */
/* Threads for the library's parallel calls and for comparing logits. They sleep between calls. */
#ifndef TQKV_WORKERS_H
#define TQKV_WORKERS_H

#include "turboquant/types.h"

typedef struct workers workers;

/* n_threads >= 1, the calling thread counted. Never NULL. */
workers *workers_create(uint32_t n_threads);
void workers_destroy(workers *w);
/* Lives as long as w. */
const tqkv_parallel *workers_parallel(const workers *w);

#endif /* TQKV_WORKERS_H */
