/* SPDX-License-Identifier: Apache-2.0 */
/* The tables that dispatch.c chooses from, and the kernels that other tables fall back on. */
#ifndef TQKVK_TABLES_H
#define TQKVK_TABLES_H

#include "kernels/kernels.h"

tqkvk_transform_fn tqkvk_transform_f32_ref;
tqkvk_encode_row_fn tqkvk_encode_row_f32_ref;
tqkvk_unpack_rows_fn tqkvk_unpack_rows_f32_ref;
tqkvk_unpack_block_fn tqkvk_unpack_block_f32_ref;
tqkvk_half_to_float_fn tqkvk_half_to_float_ref;
tqkvk_float_to_half_fn tqkvk_float_to_half_ref;
tqkvk_dot_tile_fn tqkvk_dot_tile_f32_ref;
tqkvk_softmax_step_fn tqkvk_softmax_step_f32_ref;
tqkvk_accumulate_tile_fn tqkvk_accumulate_tile_f32_ref;

#if TQKV_HAVE_X86
tqkvk_transform_fn tqkvk_transform_f32_avx2;
tqkvk_encode_row_fn tqkvk_encode_row_f32_avx2;
tqkvk_unpack_rows_fn tqkvk_unpack_rows_f32_avx2;
tqkvk_unpack_block_fn tqkvk_unpack_block_f32_avx2;
tqkvk_half_to_float_fn tqkvk_half_to_float_avx2;
tqkvk_float_to_half_fn tqkvk_float_to_half_avx2;
tqkvk_dot_tile_fn tqkvk_dot_tile_f32_avx2;
tqkvk_softmax_step_fn tqkvk_softmax_step_f32_avx2;
tqkvk_accumulate_tile_fn tqkvk_accumulate_tile_f32_avx2;
#endif

#endif /* TQKVK_TABLES_H */
