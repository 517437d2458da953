/* SPDX-License-Identifier: Apache-2.0 */
/* Random tokens, some of which codecs stumble over, stored by a kernel and by the CPU codec (store_case.h). */
#include "store_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Rows that codecs stumble over. */
static void spoil_row(test_random *random, float *row, uint32_t dim)
{
    const uint32_t kind = test_random_u32(random) % 12, d = test_random_u32(random) % dim;
    for (uint32_t i = 0; i < dim && kind < 3; i++)
        row[i] = kind == 0 ? 0.0f : kind == 1 ? row[i] * 1e4f : row[i] * 1e-4f;
    if (kind == 3)
        row[d] = NAN;
    if (kind == 4)
        row[d] = INFINITY;
    if (kind == 5)
        row[d] = 3000.0f;
}

static void place_token(test_random *random, const layer *l, cell_order order, uint32_t i,
                        uint32_t n_tokens, uint32_t n_slots, int64_t *slot, int32_t *position)
{
    if (order == SCATTERED) {
        *slot = i % 7 == 3 ? -1 : (int64_t)((i * 2 + 1) % n_slots);
        *position = (int32_t)(test_random_u32(random) % 131072);
    } else if (order == IN_ORDER) {
        *slot = (int64_t)i + 5;
        *position = (int32_t)(3 * l->plan->frame_tokens + i - n_tokens / 2);
    } else {
        *slot = (int64_t)n_slots - 1 - i;
        *position = i % 5 == 4 ? INT32_MIN + (int32_t)(i % 2) * 70
                               : (int32_t)(i * 37) - (int32_t)(n_tokens * 18);
    }
}

/* x as it is once stored: what codecs must find again. */
static void store_once(const layer *l, uint32_t tier, uint32_t g, tqkv_side side, int32_t position,
                       float *x)
{
    uint8_t *block = calloc(1, block_bytes(l, tier));

    assert_non_null(block);
    put_row(l, tier, g, side, position, x, block, 0);
    get_row(l, tier, g, side, position, block, 0, x);
    free(block);
}

/* What the pool of a tier holds once the tokens of x: [side][n_tokens][n_kv_heads][dim] are in it; to be freed. */
static uint8_t *expect_pool(const layer *l, uint32_t tier, float *const x[2], const int64_t *slots,
                            const int32_t *positions, uint32_t n_tokens, size_t bytes)
{
    uint8_t *pool = malloc(bytes);

    assert_non_null(pool);
    memset(pool, POISON, bytes);
    for (uint32_t i = 0; i < n_tokens; i++)
        for (int side = 0; side < 2; side++)
            for (uint32_t g = 0; g < l->n_kv_heads && slots[i] >= 0; g++)
                put_row(l, tier, g, (tqkv_side)side, positions[i],
                        x[side] + ((size_t)i * l->n_kv_heads + g) * l->dims[side],
                        pool + (size_t)(slots[i] / 16) * block_bytes(l, tier),
                        (uint32_t)(slots[i] % 16));
    return pool;
}

static void check_pool(const layer *l, uint32_t tier, const void *pool, const uint8_t *want, size_t bytes)
{
    uint8_t *got = malloc(bytes);
    size_t n_different = 0;

    assert_non_null(got);
    to_host(got, pool, bytes);
    for (size_t i = 0; i < bytes; i++)
        n_different += got[i] != want[i];
    free(got);
    if (n_different)
        fprintf(stderr, "store: dim %u tier %u: %zu bytes differ\n", l->dim, tier, n_different);
    assert_int_equal(n_different, 0);
}

/* The slots of a tier: like those of the first one, but runs of tokens are left out, as of a prompt in young tiers. */
static int64_t *slots_of_tier(const int64_t *slots, uint32_t n_tokens, uint32_t index)
{
    int64_t *out = malloc(n_tokens * sizeof(*out));

    assert_non_null(out);
    for (uint32_t i = 0; i < n_tokens; i++)
        out[i] = index > 0 && i / (16u << index) % 4 == index ? -1 : slots[i];
    return out;
}

void check_store(test_random *random, const layer *l, uint32_t tier, uint32_t n_tokens,
                        tqkv_cuda_type type, cell_order order)
{
    const uint32_t page_tokens = 16u << test_random_u32(random) % 4,
                   n_pages = 2 * n_tokens / page_tokens + 2;
    uint32_t n_tiers = 0; /* from `tier` on */
    const size_t n_rows = (size_t)n_tokens * l->n_kv_heads;
    float *x[2] = {random_rows(random, n_rows, l->dims[TQKV_SIDE_K], 1.0f),
                   random_rows(random, n_rows, l->dims[TQKV_SIDE_V], 1.0f)};
    int64_t *slots = malloc(n_tokens * sizeof(*slots));
    int32_t *positions = malloc(n_tokens * sizeof(*positions));
    int64_t *slots_of[TQKV_TIERS_MAX];
    void *device[2], *device_slots[TQKV_TIERS_MAX];

    assert_true(slots && positions);
    for (uint32_t i = 0; i < n_tokens; i++) {
        place_token(random, l, order, i, n_tokens, n_pages * page_tokens, &slots[i], &positions[i]);
        for (uint32_t g = 0; g < l->n_kv_heads; g++) {
            for (int side = 0; side < 2; side++) {
                float *of_head = x[side] + ((size_t)i * l->n_kv_heads + g) * l->dims[side];
                if (test_random_u32(random) % 4 == 0)
                    store_once(l, tier, g, (tqkv_side)side, positions[i], of_head);
                else
                    spoil_row(random, of_head, l->dims[side]);
            }
        }
    }
    for (int side = 0; side < 2; side++) {
        void *typed = as_type(x[side], n_rows * l->dims[side], type);
        device[side] = device_bytes(typed, n_rows * l->dims[side] * type_bytes(type));
        free(typed);
    }
    tqkv_cuda_store_args args = {.k = device[0],
                                 .v = device[1],
                                 .k_token_stride = (size_t)l->n_kv_heads * l->dims[TQKV_SIDE_K],
                                 .v_token_stride = (size_t)l->n_kv_heads * l->dims[TQKV_SIDE_V],
                                 .positions = device_bytes(positions, n_tokens * 4),
                                 .n_tokens = n_tokens,
                                 .page_tokens = page_tokens,
                                 .type = type};
    for (; tqkv_cuda_page_bytes(l->cuda, tier + n_tiers, 16) > 0; n_tiers++) {
        slots_of[n_tiers] = slots_of_tier(slots, n_tokens, n_tiers);
        device_slots[n_tiers] = device_bytes(slots_of[n_tiers], n_tokens * 8);
        args.slots[tier + n_tiers] = device_slots[n_tiers];
        args.pool[tier + n_tiers] =
            device_bytes(NULL, n_pages * tqkv_cuda_page_bytes(l->cuda, tier + n_tiers, page_tokens));
    }
    assert_int_equal(tqkv_cuda_store(l->cuda, l->image, &args, NULL), TQKV_OK);
    for (uint32_t i = 0; i < n_tiers; i++) {
        const size_t bytes = n_pages * tqkv_cuda_page_bytes(l->cuda, tier + i, page_tokens);
        uint8_t *want = expect_pool(l, tier + i, x, slots_of[i], positions, n_tokens, bytes);
        check_pool(l, tier + i, args.pool[tier + i], want, bytes);
        free(want);
        free(slots_of[i]);
        check(cudaFree(args.pool[tier + i]));
        check(cudaFree(device_slots[i]));
    }
    check(cudaFree((void *)(uintptr_t)args.positions));
    for (int side = 0; side < 2; side++) {
        check(cudaFree(device[side]));
        free(x[side]);
    }
    free(slots);
    free(positions);
}
