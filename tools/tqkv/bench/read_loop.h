/* SPDX-License-Identifier: Apache-2.0 */
/* The bandwidth of memory: threads that read a buffer larger than any cache and do nothing else. */
#ifndef TQKV_READ_LOOP_H
#define TQKV_READ_LOOP_H

#include <stdint.h>

typedef struct read_loop read_loop;

/* Never NULL. */
read_loop *read_loop_create(uint32_t n_threads);
void read_loop_destroy(read_loop *loop);
double read_loop_bytes(void); /* that one run reads */

/* For in_turn. */
void read_loop_begin(void *loop);
void read_loop_run(void *loop);
void read_loop_end(void *loop);

#endif /* TQKV_READ_LOOP_H */
