/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What tests of kernels share: a layer of a random plan, sequences of it in pages on the host and on the device, and
 * attention in float64 over the rows that the CPU decodes. Failures end the test.
 */
#ifndef CUDA_CASE_H
#define CUDA_CASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#include "base/half.h"
#include "codec/layer_codec.h"
#include "test_plan_make.h"
#include "turboquant/cuda.h"

#define POISON 0xff /* NaN in every type, and no code that a test expects */
#define N_TIERS 3
#define SKIPPED 77 /* exit status of a test without a device */

/* Shared memory of a multiprocessor, of compute capability 8.0 and of 8.6, 8.9 and 12.0; a block has 1 KiB less. */
#define SHARED_BYTES_80 (164 << 10)
#define SHARED_BYTES_86 (100 << 10)

typedef struct layer {
    tqkv_plan *plan;
    tqkv_codec *codec;
    tqkv_cuda_layer *cuda;
    void *image;
    uint32_t dim, n_heads, n_kv_heads; /* dim: of K */
    uint32_t dims[2];                  /* by side */
} layer;

typedef struct sequences {
    uint32_t n, max_tokens, page_tokens, table_stride, tiers_stride, n_pages;
    int32_t *lengths, *table;
    uint8_t *tiers, *pool[N_TIERS];
    tqkv_cuda_pages device;
    int32_t *device_lengths;
} sequences;

/* --seed N and --short; prints the seed. Returns whether the run is short. */
bool read_arguments(int argc, char **argv, uint64_t *seed);
/* Says so if there is none. */
bool has_device(void);
/* Shared memory of a multiprocessor as the library sees it from now on, as smaller devices have it; 0: what there is. */
void limit_shared_memory(int bytes);
void check(cudaError_t error);
void *device_bytes(const void *from, size_t n);
void to_host(void *to, const void *from, size_t n);
layer make_layer_of(test_random *random, uint32_t dim, uint32_t n_heads, uint32_t n_kv_heads,
                    uint32_t style, uint32_t n_tiers);
layer make_layer(test_random *random, uint32_t dim, uint32_t n_heads, uint32_t n_kv_heads,
                 uint32_t style);
/* A latent layer of 64 and 512 channels. */
layer make_latent_layer(test_random *random, uint32_t n_heads, uint32_t style, uint32_t n_tiers);
void free_layer(layer *l);
uint32_t section_offset(const layer *l, uint32_t tier, uint32_t g, tqkv_side side);
uint32_t block_bytes(const layer *l, uint32_t tier);
int32_t base_of(const layer *l, tqkv_side side, int32_t position);
void put_row(const layer *l, uint32_t tier, uint32_t g, tqkv_side side, int32_t position,
             const float *x, uint8_t *block, uint32_t slot);
void get_row(const layer *l, uint32_t tier, uint32_t g, tqkv_side side, int32_t position,
             const uint8_t *block, uint32_t slot, float *x);
size_t type_bytes(tqkv_cuda_type type);
float bf16_to_float(uint16_t v);
uint16_t float_to_bf16(float f);
void *as_type(float *x, size_t n, tqkv_cuda_type type);
float *from_type(const void *p, size_t n, tqkv_cuda_type type);
float *random_rows(test_random *random, size_t n_rows, uint32_t dim, float size);
uint8_t *block_of(const layer *l, const sequences *s, uint32_t seq, uint32_t token);
sequences make_sequences(test_random *random, const layer *l, const int32_t *lengths,
                         uint32_t n, uint32_t page_tokens, bool tiers);
void free_sequences(sequences *s);
void decode_rows(const layer *l, const sequences *s, uint32_t seq, uint32_t g, float *rows[2]);
double row_error(const layer *l, float *const rows[2], uint32_t n, const float *q, double scale,
                 double rounding, const float *out, float lse);

#endif /* CUDA_CASE_H */
