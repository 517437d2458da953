/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The image of a layer: everything that kernels read besides pages, made on the host by image.c.
 * Common subset of C and CUDA C++.
 *
 *     | tables | layouts [tier][KV head] | inv_freq | sides: mean, weight, transform, matrix, row scale | latents |
 *
 * `matrix` is what a query (K) or a sum of values (V) is multiplied by, cut into the 16 x 16
 * operands of a tensor core multiply, as the sum of two f16 matrices (22 bits). Decode reads the first one
 * only: half of what a block reads before its tiles, for errors below those of codes of 8 bits. Prompts and unpacked
 * rows take both:
 *
 *     K   q'[j] = sum_i inverse[j][i] q[i]          V   x[i] = sum_j inverse[j][i] y[j]
 *
 * A latent layer (plan.h) has one KV head, K of 64 channels and V of 512, which its kernels leave in coded space:
 * there is no matrix of V, and that of K is also there in f32, as [i][j].
 */
#ifndef TQKVC_IMAGE_H
#define TQKVC_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "turboquant/cuda.h"

#define TQKVC_UNITS_MAX 16 /* heads of up to 256 channels */
#define TQKVC_LATENT_DIM 512 /* channels of V in a latent layer */
#define TQKVC_LATENT_K_DIM 64
#define TQKVC_WIDTHS 9     /* tables are indexed by width, 0..8 */
#define TQKVC_BLOCK_TOKENS 16
#define TQKVC_TILE_BLOCKS (TQKV_CUDA_TILE_TOKENS / TQKVC_BLOCK_TOKENS)

#define TQKVC_WORDS 15  /* of a width */
#define TQKVC_V_WORDS 4 /* in width 4 the words of V are behind those of K */

/*
 * Bytes of a width for look-ups of eight (lookup.cuh): two words each. Widths 1..3 have the levels.
 * Width 4 has, for K, negative levels minus 1 and positive levels; for V, negative levels without
 * sign and positive levels. Widths 5 and 6 have the magnitudes.
 */
typedef struct tqkvc_width {
    uint32_t words[TQKVC_WORDS];
    float step; /* behind the words: decode copies both */
    uint8_t magnitude[128]; /* levels without sign, ascending */
} tqkvc_width;

#define TQKVC_NO_MAGNITUDE 255

/* What store copies to shared memory, all of it. Width 0 is 0 throughout. */
typedef struct tqkvc_encode_tables {
    float scale_values[256], scale_inverses[256], energy_thresholds[256], peak_thresholds[256];
    float step[TQKVC_WIDTHS], inv_step2[TQKVC_WIDTHS], inv_peak[TQKVC_WIDTHS];
    float reserved;
    uint8_t level[TQKVC_WIDTHS][256]; /* nearest to t half levels, t = 0..254 */
    uint8_t index[TQKVC_WIDTHS][128]; /* of the magnitude that is this level, if there is one */
    int16_t level_octaves[128];       /* by magnitude; from 127, in steps of a scale */
} tqkvc_encode_tables;

typedef struct tqkvc_tables {
    tqkvc_width widths[TQKVC_WIDTHS];
    tqkvc_encode_tables encode;
} tqkvc_tables;

/* Traits of one side of a KV head. */
#define TQKVC_ZERO_MEAN 1u /* the mean is 0 in every channel */
#define TQKVC_HADAMARD \
    2u /* the transform is Walsh-Hadamard matrices; its first column has factors */

/* Where the units of a tier of a latent layer are in a block, and how wide: those of V, then those of K. */
#define TQKVC_LATENT_V_UNITS (TQKVC_LATENT_DIM / 16)
#define TQKVC_LATENT_K_UNITS (TQKVC_LATENT_K_DIM / 16)
#define TQKVC_LATENT_UNITS (TQKVC_LATENT_V_UNITS + TQKVC_LATENT_K_UNITS)

typedef struct tqkvc_latent_units {
    uint32_t v_section;
    uint16_t offset[TQKVC_LATENT_UNITS];
    uint8_t bits[TQKVC_LATENT_UNITS];
} tqkvc_latent_units;

/* One KV head in a block of one tier: its section of K at `offset`, that of V behind it. */
typedef struct tqkvc_layout {
    uint32_t offset;
    uint32_t bytes[2];
    uint16_t traits[2];
    uint64_t widths[2]; /* four bits a unit, unit 0 lowest */
    uint64_t more_widths; /* of units 16 to 31 of V */
} tqkvc_layout;

/* Where the parts of an image are, in bytes; by side where there are two. */
typedef struct tqkvc_parts {
    uint32_t layouts, inv_freq;
    uint32_t mean[2];      /* f32 [KV head][dim] */
    uint32_t weight[2];    /* f32 [KV head][units], divided by the largest */
    uint32_t transform[2]; /* f32 [KV head][dim][dim], i to j: the order of docs/FORMAT.md */
    uint32_t matrix[2];    /* u32 [KV head][high, low][dim / 16][dim / 16][32 lanes][4] */
    uint32_t row_scale[2]; /* f32 [KV head][dim]: row i of the matrix was divided by it */
    uint32_t query_matrix; /* of latent layers: f32 [k_dim][k_dim], inverse[j][i] at [i][j] */
    uint32_t coded_mean;   /* of latent layers: f32 [v_dim], the mean of V in coded space */
    uint32_t latent_units; /* of latent layers: [tier] */
} tqkvc_parts;

/* What launches need on the host, and kernels get by value. */
typedef struct tqkvc_shape {
    uint32_t dim, n_heads, n_kv_heads, n_tiers, frame_tokens; /* dim: of K, and of V in other layers than latent ones */
    bool is_latent;
    uint32_t rope_style, n_rot;
    uint32_t traits_any; /* of any head */
    uint32_t block_bytes[TQKV_TIERS_MAX];
    uint32_t section_bytes_max[TQKV_TIERS_MAX]; /* K and V of one KV head */
    tqkvc_parts parts;
} tqkvc_shape;

/* tqkv_cuda_layer is this object. */
struct tqkv_cuda_layer {
    tqkv_allocator mem;
    tqkvc_shape shape;
    uint8_t *image;
    size_t image_bytes;
    float *latent_inverse; /* [v_dim][v_dim] of a latent layer; otherwise NULL */
};

#endif /* TQKVC_IMAGE_H */
