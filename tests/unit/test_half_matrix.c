/* SPDX-License-Identifier: Apache-2.0 */
/* What a codec keeps at hand: matrices in half the bytes (exact or rounded, or none), and turns. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "codec/half_matrix.h"
#include "codec/layer_codec.h"
#include "test_arrays.h"
#include "test_store_make.h"

enum { DIM = 48 };

static float value_of(const tqkvk_half_matrix *half, size_t i, size_t j)
{
    return tqkvi_half_to_float(half->value[i * DIM + j]) * half->factor[j];
}

static void test_rounded(void **state)
{
    test_random random = {11};
    float *m = test_random_floats(&random, DIM * DIM, 1);
    void *memory = test_aligned(tqkvi_half_matrix_bytes(DIM));
    tqkvk_half_matrix half;

    (void)state;
    for (size_t i = 0; i < DIM * DIM; i++)
        m[i] = ldexpf(m[i], (int)(test_random_u32(&random) % 60) - 30);
    for (int transposed = 0; transposed < 2; transposed++) {
        tqkvi_half_matrix_init(&half, memory, m, transposed ? 1 : DIM, transposed ? DIM : 1, DIM,
                               true);
        assert_non_null(half.value);
        for (size_t j = 0; j < DIM; j++) {
            float largest = 0;
            for (size_t i = 0; i < DIM; i++)
                largest = fmaxf(largest, fabsf(m[transposed ? j * DIM + i : i * DIM + j]));
            for (size_t i = 0; i < DIM; i++) {
                const float want = m[transposed ? j * DIM + i : i * DIM + j];
                const float most = fmaxf(0x1p-11f * fabsf(want), 0x1p-39f * largest);
                assert_true(fabsf(value_of(&half, i, j) - want) <= most);
            }
        }
    }
    free(m);
    free(memory);
}

/* Nothing is kept that would change, and nothing that f16 values times 2^112 do not reach. */
static void test_none(void **state)
{
    test_random random = {12};
    float *m = test_random_floats(&random, DIM * DIM, 1);
    void *memory = test_aligned(tqkvi_half_matrix_bytes(DIM));
    tqkvk_half_matrix half;

    (void)state;
    tqkvi_half_matrix_init(&half, memory, m, DIM, 1, DIM, false);
    assert_null(half.value);
    tqkvi_transform_round(m, DIM);
    tqkvi_half_matrix_init(&half, memory, m, DIM, 1, DIM, false);
    assert_non_null(half.value);
    for (size_t i = 0; i < DIM * DIM; i++)
        assert_true(value_of(&half, i / DIM, i % DIM) == m[i]);
    m[DIM * DIM - 1] = FLT_MAX;
    tqkvi_half_matrix_init(&half, memory, m, DIM, 1, DIM, true);
    assert_null(half.value);
    free(m);
    free(memory);
}

/* A codec's copies are those of its transform and of its inverse, of K transposed. */
static void test_codec_has_them(void **state)
{
    static const uint32_t tier_tokens[] = {32};
    const tqkv_plan_layer shape = test_shape(4, 2, DIM, DIM);
    tqkv_plan *plan;
    tqkv_codec *codec;

    (void)state;
    assert_int_equal(test_tiered_plan(3, &shape, 2, tier_tokens, 4, 64, &plan), TQKV_OK);
    assert_int_equal(tqkvi_codec_create(plan, 0, NULL, NULL, &codec), TQKV_OK);
    for (uint32_t n = 0; n < 4; n++) {
        const tqkvi_head_codec *head = &codec->heads[n & 1][n / 2];
        assert_non_null(head->transform_half.value);
        assert_non_null(head->inverse_half.value);
        for (size_t i = 0; i < DIM; i++) {
            for (size_t j = 0; j < DIM; j++) {
                const size_t at = (n & 1) == TQKV_SIDE_K ? j * DIM + i : i * DIM + j;
                assert_true(value_of(&head->transform_half, i, j) ==
                            head->plan->transform[i * DIM + j]);
                assert_true(fabsf(value_of(&head->inverse_half, i, j) - head->inverse[at]) <=
                            0x1p-11f * fabsf(head->inverse[at]) + 0x1p-24f);
            }
        }
    }
    tqkvi_codec_destroy(codec);

    /* A transform that the file could not hold still encodes, by the matrix itself. */
    plan->layers[0].heads[TQKV_SIDE_V][1].transform[5] *= 1.0001f;
    assert_int_equal(tqkvi_codec_create(plan, 0, NULL, NULL, &codec), TQKV_OK);
    assert_null(codec->heads[TQKV_SIDE_V][1].transform_half.value);
    assert_non_null(codec->heads[TQKV_SIDE_V][1].inverse_half.value);
    tqkvi_codec_destroy(codec);
    tqkv_plan_destroy(plan);
}

/* Kept or not, a turn is the same bits. */
static void test_turns(void **state)
{
    enum { FRAME = 64 };
    static const int32_t bases[] = {
        0,          FRAME,  2 * FRAME, FRAME + 1,                 32 * FRAME,
        33 * FRAME, -FRAME, INT32_MAX, INT32_MAX / FRAME * FRAME, INT32_MIN};
    static const uint32_t tier_tokens[] = {32};
    const tqkv_plan_layer shape = test_shape(4, 2, DIM, DIM);
    tqkv_plan *plan;
    tqkv_codec *codec;

    (void)state;
    assert_int_equal(test_tiered_plan(3, &shape, 2, tier_tokens, 4, FRAME, &plan), TQKV_OK);
    assert_int_equal(tqkvi_codec_create(plan, 0, NULL, NULL, &codec), TQKV_OK);
    assert_true(codec->rope.n_rot > 0 && codec->n_turns > 0);
    for (size_t i = 0; i < sizeof(bases) / sizeof(bases[0]); i++) {
        float kept[2][DIM / 2] = {{0}}, made[2][DIM / 2] = {{0}};
        tqkvi_codec_turn(codec, bases[i], kept[0], kept[1]);
        tqkvi_turn_init(&codec->rope, bases[i], made[0], made[1]);
        assert_memory_equal(kept, made, sizeof(kept));
    }
    tqkvi_codec_destroy(codec);
    tqkv_plan_destroy(plan);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounded),
        cmocka_unit_test(test_none),
        cmocka_unit_test(test_codec_has_them),
        cmocka_unit_test(test_turns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
