/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Launchers of the kernels, one per file of device code, and what they take. launch.c checks the
 * public arguments and fills these in. Common subset of C and CUDA C++.
 */
#ifndef TQKVC_LAUNCH_H
#define TQKVC_LAUNCH_H

#include <stdbool.h>

#include "cuda/image.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TQKVC_SPLITS_MAX 64 /* parts of the tokens of a sequence */
#define TQKVC_WARPS 4       /* of a thread block of decode */
#define TQKVC_BLOCKS_MAX 4  /* of a multiprocessor */
#define TQKVC_CLUSTER_MAX 16 /* splits of a cluster */
#define TQKVC_CLUSTER_PORTABLE 8
#define TQKVC_COPIES_MAX (1u << 20) /* of pages, in a tier */
#define TQKVC_LN_2 0.69314718f

/*
 * Queries of frames: what decode multiplies with codes. Rows of a KV head (query token * group + head)
 * are cut into tiles of 4 or 8.
 */
typedef struct tqkvc_frames {
    tqkvc_shape shape;
    const uint8_t *image;
    const void *q;           /* [n_seqs][q_len][n_heads][dim] */
    const int32_t *seq_lens; /* [n_seqs] */
    float *products;         /* [n_seqs][KV heads][row tiles][n_frames][rows][dim]; see frames.cuh */
    float *means;            /* [n_seqs][KV heads][row tiles][n_frames][rows] */
    uint32_t n_seqs, q_len, n_rows, n_frames, frame_tokens;
    uint32_t rows_per_tile, n_row_tiles;
    tqkv_cuda_type type;
} tqkvc_frames;

typedef struct tqkvc_decode {
    tqkvc_frames frames;
    tqkv_cuda_pages pages;
    uint32_t page_bytes[TQKV_TIERS_MAX];
    void *out;
    float *lse;
    void *parts;        /* [n_seqs][n_kv_heads][row tiles][n_splits]; see decode.cu */
    uint32_t *arrivals; /* [n_seqs][n_kv_heads][row tiles], zero between calls */
    uint32_t n_splits, n_blocks; /* n_blocks: of a multiprocessor */
    bool is_cluster;             /* the splits, 2, 4, 8 or 16 of them, are a cluster */
    uint32_t n_fetched;          /* units of a matrix that it has in shared memory */
    uint32_t tile_bytes, tile_blocks[TQKV_TIERS_MAX]; /* of one warp */
    float scale_log2;            /* scale * log2(e) */
    bool is_early;               /* starts before the kernel ahead has ended, and waits for it */
    bool after_store;            /* as in tqkv_cuda_decode_args; only with is_early */
} tqkvc_decode;

/* frames: shape, image, q, frame_tokens and type only. */
typedef struct tqkvc_prefill {
    tqkvc_frames frames;
    tqkv_cuda_prefill_args args;
    uint32_t page_bytes[TQKV_TIERS_MAX];
    float *parts, *part_lse; /* [n_splits][n_tokens][n_heads][dim], [n_splits][n_tokens][n_heads] */
    uint32_t n_splits, staged_bytes, shared_bytes_max; /* staged_bytes: codes of a tile */
    uint32_t n_stages, staged_log; /* tiles of levels, 1 or 2; log2 of tiles of codes: the launch chooses these */
    bool has_low, has_matrix;    /* rows have low parts; the matrix of K is in shared memory */
    float scale_log2;
} tqkvc_prefill;

/* Decode of a latent layer. Rows of a sequence: query token * heads + head. */
typedef struct tqkvc_latent_decode {
    tqkvc_shape shape;
    const uint8_t *image;
    tqkv_cuda_pages pages;
    uint32_t page_bytes[TQKV_TIERS_MAX];
    const void *q;           /* [n_seqs][n_rows][v_dim + k_dim] */
    void *out;               /* [n_seqs][n_rows][v_dim] */
    float *lse;
    const int32_t *seq_lens; /* [n_seqs] */
    float *parts;            /* [n_seqs][n_rows][n_splits][v_dim] */
    float *part_sums;        /* [n_seqs][n_rows][n_splits][2]: log2 of the largest weight, sum of weights divided by it */
    uint32_t n_seqs, q_len, n_rows, max_tokens, frame_tokens;
    uint32_t row_tiles;      /* of 16 rows, of a block: 1, 2 or 4 */
    uint32_t n_splits, staged_bytes, n_stages; /* codes of a tile; tiles of codes, 1 or 2 */
    tqkv_cuda_type type;
    float scale_log2;
} tqkvc_latent_decode;

typedef struct tqkvc_gather {
    tqkvc_shape shape;
    const uint8_t *image;
    tqkv_cuda_gather_args args;
    uint32_t page_bytes[TQKV_TIERS_MAX];
} tqkvc_gather;

typedef struct tqkvc_store {
    tqkvc_shape shape;
    const uint8_t *image;
    tqkv_cuda_store_args args;
    uint32_t page_bytes[TQKV_TIERS_MAX];
    uint32_t n_tiers, tiers[TQKV_TIERS_MAX]; /* that have slots */
    uint32_t n_together; /* tiers of a block, a power of two: the launch chooses it */
    bool is_one_side; /* a launch of `side` alone: of a latent layer */
    uint32_t side;
} tqkvc_store;

typedef struct tqkvc_unpack {
    tqkvc_shape shape;
    const uint8_t *image;
    tqkv_cuda_unpack_args args;
    uint32_t page_bytes[TQKV_TIERS_MAX];
} tqkvc_unpack;

tqkv_status tqkvc_launch_decode(const tqkvc_decode *decode, void *stream);
uint32_t tqkvc_decode_code(void); /* compute capability, times 10, that its code for this device was written for; 0: none */
/* Bytes of shared memory of a block of decode, without units of a matrix. */
size_t tqkvc_decode_shared_bytes(uint32_t dim, uint32_t rows_per_tile, uint32_t tile_bytes,
                                 bool is_cluster);
tqkv_status tqkvc_launch_prefill(const tqkvc_prefill *prefill, void *stream);
uint32_t tqkvc_prefill_rows_of_block(uint32_t dim);
uint32_t tqkvc_prefill_blocks_of_tile(uint32_t dim); /* of 16 tokens */
tqkv_status tqkvc_launch_latent_decode(const tqkvc_latent_decode *decode, void *stream);
uint32_t tqkvc_latent_shared_bytes(uint32_t row_tiles, uint32_t staged_bytes, uint32_t n_stages);
tqkv_status tqkvc_launch_gather(const tqkvc_gather *gather, void *stream);
tqkv_status tqkvc_launch_store(const tqkvc_store *store, void *stream);
tqkv_status tqkvc_launch_unpack(const tqkvc_unpack *unpack, void *stream);
tqkv_status tqkvc_launch_page_tables(const tqkv_cuda_page_tables_args *args, void *stream);
tqkv_status tqkvc_launch_merge(void *out_a, float *lse_a, const void *out_b, const float *lse_b,
                               size_t n_rows, uint32_t dim, tqkv_cuda_type type, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* TQKVC_LAUNCH_H */
