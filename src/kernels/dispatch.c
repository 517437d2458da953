/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table per instruction set and the choice between them. A table names the version below for
 * what it does not have itself.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu.h"
#include "kernels/tables.h"

#define TABLES_MAX 8

static const tqkvk_table table_ref = {
    .name = "ref",
    .transform = tqkvk_transform_f32_ref,
    .encode_row = tqkvk_encode_row_f32_ref,
    .unpack_rows = tqkvk_unpack_rows_f32_ref,
    .unpack_block = tqkvk_unpack_block_f32_ref,
    .half_to_float = tqkvk_half_to_float_ref,
    .float_to_half = tqkvk_float_to_half_ref,
    .dot_tile = tqkvk_dot_tile_f32_ref,
    .softmax_step = tqkvk_softmax_step_f32_ref,
    .accumulate_tile = tqkvk_accumulate_tile_f32_ref,
    .round_query = tqkvk_round_query_i8_ref,
    .score_blocks = tqkvk_score_blocks_i8_ref,
    .scale_scores = tqkvk_scale_scores_f32_ref,
    .round_weights = tqkvk_round_weights_i16_ref,
    .weigh_blocks = tqkvk_weigh_blocks_i8_ref,
};

#if TQKV_HAVE_X86
static const tqkvk_table table_avx2 = {
    .name = "avx2",
    .transform = tqkvk_transform_f32_avx2,
    .encode_row = tqkvk_encode_row_f32_avx2,
    .unpack_rows = tqkvk_unpack_rows_f32_avx2,
    .unpack_block = tqkvk_unpack_block_f32_avx2,
    .half_to_float = tqkvk_half_to_float_avx2,
    .float_to_half = tqkvk_float_to_half_avx2,
    .dot_tile = tqkvk_dot_tile_f32_avx2,
    .softmax_step = tqkvk_softmax_step_f32_avx2,
    .accumulate_tile = tqkvk_accumulate_tile_f32_avx2,
    .round_query = tqkvk_round_query_i8_avx2,
    .score_blocks = tqkvk_score_blocks_i8_avx2,
    .scale_scores = tqkvk_scale_scores_f32_avx2,
    .round_weights = tqkvk_round_weights_i16_avx2,
    .weigh_blocks = tqkvk_weigh_blocks_i8_avx2,
};

static const tqkvk_table table_avx512 = {
    .name = "avx512",
    .transform = tqkvk_transform_f32_avx2,
    .encode_row = tqkvk_encode_row_f32_avx2,
    .unpack_rows = tqkvk_unpack_rows_f32_avx2,
    .unpack_block = tqkvk_unpack_block_f32_avx2,
    .half_to_float = tqkvk_half_to_float_avx2,
    .float_to_half = tqkvk_float_to_half_avx2,
    .dot_tile = tqkvk_dot_tile_f32_avx2,
    .softmax_step = tqkvk_softmax_step_f32_avx2,
    .accumulate_tile = tqkvk_accumulate_tile_f32_avx2,
    .round_query = tqkvk_round_query_i8_avx2,
    .score_blocks = tqkvk_score_blocks_i8_avx512,
    .scale_scores = tqkvk_scale_scores_f32_avx2,
    .round_weights = tqkvk_round_weights_i16_avx2,
    .weigh_blocks = tqkvk_weigh_blocks_i8_avx512,
};
#endif

#if TQKV_HAVE_ARM
static const tqkvk_table table_neon = {
    .name = "neon",
    .transform = tqkvk_transform_f32_neon,
    .encode_row = tqkvk_encode_row_f32_neon,
    .unpack_rows = tqkvk_unpack_rows_f32_neon,
    .unpack_block = tqkvk_unpack_block_f32_neon,
    .half_to_float = tqkvk_half_to_float_neon,
    .float_to_half = tqkvk_float_to_half_neon,
    .dot_tile = tqkvk_dot_tile_f32_neon,
    .softmax_step = tqkvk_softmax_step_f32_neon,
    .accumulate_tile = tqkvk_accumulate_tile_f32_neon,
    .round_query = tqkvk_round_query_i8_neon,
    .score_blocks = tqkvk_score_blocks_i8_neon,
    .scale_scores = tqkvk_scale_scores_f32_neon,
    .round_weights = tqkvk_round_weights_i16_neon,
    .weigh_blocks = tqkvk_weigh_blocks_i8_neon,
};

static const tqkvk_table table_neon_dotprod = {
    .name = "neon-dotprod",
    .transform = tqkvk_transform_f32_neon,
    .encode_row = tqkvk_encode_row_f32_neon,
    .unpack_rows = tqkvk_unpack_rows_f32_neon,
    .unpack_block = tqkvk_unpack_block_f32_neon,
    .half_to_float = tqkvk_half_to_float_neon,
    .float_to_half = tqkvk_float_to_half_neon,
    .dot_tile = tqkvk_dot_tile_f32_neon,
    .softmax_step = tqkvk_softmax_step_f32_neon,
    .accumulate_tile = tqkvk_accumulate_tile_f32_neon,
    .round_query = tqkvk_round_query_i8_neon,
    .score_blocks = tqkvk_score_blocks_i8_dotprod,
    .scale_scores = tqkvk_scale_scores_f32_neon,
    .round_weights = tqkvk_round_weights_i16_neon,
    .weigh_blocks = tqkvk_weigh_blocks_i8_dotprod,
};
#endif

/* What this CPU runs, lowest first. */
static size_t list_tables(const tqkvk_table *out[TABLES_MAX])
{
    size_t n = 0;
    out[n++] = &table_ref;
#if TQKV_HAVE_X86
    if (tqkvk_cpu_has_avx2())
        out[n++] = &table_avx2;
    if (tqkvk_cpu_has_avx512())
        out[n++] = &table_avx512;
#endif
#if TQKV_HAVE_ARM
    out[n++] = &table_neon;
    if (tqkvk_cpu_has_dotprod())
        out[n++] = &table_neon_dotprod;
#endif
    return n;
}

const tqkvk_table *const *tqkvk_all(size_t *n)
{
    static const tqkvk_table *tables[TABLES_MAX];
    static atomic_int state; /* 0: empty, 1: being filled, 2: filled */

    int expected = 0;
    if (atomic_compare_exchange_strong(&state, &expected, 1)) {
        (void)list_tables(tables);
        atomic_store(&state, 2);
    }
    while (atomic_load(&state) != 2) {
        /* another thread is storing a handful of pointers */
    }
    for (*n = 0; *n < TABLES_MAX && tables[*n]; ++*n) {
    }
    return tables;
}

const tqkvk_table *tqkvk_get(void)
{
    static _Atomic(const tqkvk_table *) chosen;

    const tqkvk_table *table = atomic_load_explicit(&chosen, memory_order_acquire);
    if (table)
        return table;

    const tqkvk_table *tables[TABLES_MAX];
    const size_t n = list_tables(tables);
    table = tables[n - 1];
    const char *isa = getenv("TQKV_ISA");
    for (size_t i = 0; isa && i < n; i++) {
        if (strcmp(isa, tables[i]->name) == 0)
            table = tables[i];
    }
    /* The first choice stays, whatever happens to the environment later. */
    const tqkvk_table *none = NULL;
    if (!atomic_compare_exchange_strong(&chosen, &none, table))
        table = none;
    return table;
}
