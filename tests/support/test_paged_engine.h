/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small engine with block tables: sequences come and go, share full blocks, arrive in chunks and
 * take drafts back. Every output is compared with the sum in double over rows that went through
 * the public codec, at the tier that the header promises for their distance.
 */
#ifndef TEST_PAGED_ENGINE_H
#define TEST_PAGED_ENGINE_H

#include "test_plan_make.h"
#include "turboquant/codec.h"
#include "turboquant/paged.h"

#define TEST_BLOCK 16
#define TEST_SEQS_MAX 4
#define TEST_LEN_MAX 512
#define TEST_NEW_MAX 96
#define TEST_SINKS 3  /* index of the sinks among the copies */
#define TEST_DIM_MAX 512
#define TEST_ALL 1000 /* sequences: a copy for every block, none is ever replaced */

typedef struct test_paged_case {
    const char *name;
    uint32_t n_heads, n_kv_heads, k_dim, v_dim;
    uint32_t n_tiers; /* 0: built-in f16 */
    uint32_t block_tokens, n_sequences, window;
    uint32_t n_drafts;
    bool sinks;
    float softcap;
    bool is_latent;
} test_paged_case;

typedef struct test_sequence {
    uint32_t len; /* 0: no sequence */
    int32_t table[TEST_LEN_MAX / TEST_BLOCK];
} test_sequence;

typedef struct test_engine {
    const test_paged_case *c;
    tqkv_plan *plan;
    tqkv_codec *codec;
    tqkv_paged *paged;
    test_random random;
    uint32_t n_blocks;
    size_t stride;
    uint8_t *memory;                /* the blocks, from byte 8 on */
    uint32_t users[256];            /* sequences that hold a block */
    float *rows[2];                 /* [n_blocks * block_tokens][n_kv_heads][dim] as they came */
    uint16_t held[TEST_SINKS + 1][4096]; /* tokens that copies of 16 have, by tier, then sinks */
    test_sequence seqs[TEST_SEQS_MAX];
    /* The batch. */
    uint32_t n_seqs, of[TEST_SEQS_MAX];
    int32_t query_start[TEST_SEQS_MAX + 1], seq_lens[TEST_SEQS_MAX];
    int32_t tables[TEST_SEQS_MAX][TEST_LEN_MAX / TEST_BLOCK];
    float *new_rows[2], *out, *lse, *sinks;
    float *q; /* [tokens][n_heads] of K, and of the latent behind it */
    void *scratch;
} test_engine;

/* Makes an engine for a case. */
void test_paged_setup(test_engine *e, const test_paged_case *c, uint64_t seed);
void test_paged_teardown(test_engine *e);
tqkv_paged_config test_paged_config(const test_engine *e);
/* An empty sequence stays so, or finds some blocks. */
void test_begin_sequence(test_engine *e, uint32_t s);
/* An empty sequence finds the first n blocks of another one in the prefix cache. */
void test_share_blocks(test_engine *e, uint32_t s, const test_sequence *other, uint32_t n);
void test_end_sequence(test_engine *e, uint32_t s);
/* Copies that the token behind the first n of a sequence lacks, where none is ever replaced. */
uint32_t test_lost_copies(const test_engine *e, const test_sequence *seq, uint32_t n);
/*
 * Copies lost after every 16 tokens and after all. After whole blocks of the engine, which a prefix
 * cache finds, none is, where none is ever replaced.
 */
uint32_t test_check_lost(const test_engine *e, const test_sequence *seq);
/* n new tokens of a sequence join the batch. */
void test_add_to_batch(test_engine *e, uint32_t s, uint32_t n);
/* The batch that was put together, arguments of its attention, and what runs both. */
tqkv_paged_batch test_paged_batch(test_engine *e);
tqkv_attend_args test_paged_args(const test_engine *e);
void test_run_batch(test_engine *e, const tqkv_parallel *parallel);
/* One query head of one new token of the batch. */
void test_check_row(const test_engine *e, uint32_t b, uint32_t token, uint32_t h);
/* The same against rows as they came, where halves hold them. */
void test_check_exact(const test_engine *e, uint32_t b, uint32_t token, uint32_t h);

#endif /* TEST_PAGED_ENGINE_H */
