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

/*
 * isa: ending of the kernels. wide: of those that longer vectors are for. dots: of those that another
 * instruction set has products for.
 */
#define TABLE(label, isa, wide, dots)                                                            \
    {                                                                                            \
        .name = label, .transform = tqkvk_transform_f32_##wide,                                  \
        .transform_half = tqkvk_transform_half_##wide,                                           \
        .hadamard = tqkvk_hadamard_f32_##isa, .largest_bits = tqkvk_largest_bits_##isa,          \
        .encode_rows = tqkvk_encode_rows_f32_##isa, .unpack_rows = tqkvk_unpack_rows_f32_##isa,  \
        .unpack_block = tqkvk_unpack_block_f32_##isa,                                            \
        .half_to_float = tqkvk_half_to_float_##isa, .float_to_half = tqkvk_float_to_half_##isa,  \
        .dot_tile = tqkvk_dot_tile_f32_##wide, .softmax_step = tqkvk_softmax_step_f32_##wide,    \
        .accumulate_tile = tqkvk_accumulate_tile_f32_##wide,                                     \
        .round_query = tqkvk_round_query_i8_##isa, .score_blocks = tqkvk_score_blocks_i8_##dots, \
        .scale_values = tqkvk_scale_values_##isa,                                                \
        .scale_scores = tqkvk_scale_scores_f32_##wide,                                           \
        .scale_weights = tqkvk_scale_weights_f32_##wide,                                         \
        .round_weights = tqkvk_round_weights_i16_##isa,                                          \
        .weigh_blocks = tqkvk_weigh_blocks_i8_##dots,                                            \
    }

static const tqkvk_table table_ref = TABLE("ref", ref, ref, ref);
#if TQKV_HAVE_X86
static const tqkvk_table table_avx2 = TABLE("avx2", avx2, avx2, avx2);
static const tqkvk_table table_avxvnni = TABLE("avx2-vnni", avx2, avx2, avxvnni);
static const tqkvk_table table_avx512 = TABLE("avx512", avx2, avx512, avx2);
static const tqkvk_table table_vnni = TABLE("avx512-vnni", avx2, avx512, vnni);
static const tqkvk_table table_vbmi = TABLE("avx512-vbmi", avx2, avx512, vbmi);
#endif
#if TQKV_HAVE_ARM
static const tqkvk_table table_neon = TABLE("neon", neon, neon, neon);
static const tqkvk_table table_neon_dotprod = TABLE("neon-dotprod", neon, neon, dotprod);
#endif

/* What this CPU runs, lowest first. */
static size_t list_tables(const tqkvk_table *out[TABLES_MAX])
{
    size_t n = 0;
    out[n++] = &table_ref;
#if TQKV_HAVE_X86
    if (tqkvk_cpu_has_avx2())
        out[n++] = &table_avx2;
    if (tqkvk_cpu_has_avxvnni())
        out[n++] = &table_avxvnni;
    if (tqkvk_cpu_has_avx512())
        out[n++] = &table_avx512;
    if (tqkvk_cpu_has_vnni())
        out[n++] = &table_vnni;
    if (tqkvk_cpu_has_vbmi())
        out[n++] = &table_vbmi;
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
