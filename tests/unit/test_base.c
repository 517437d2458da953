/* SPDX-License-Identifier: Apache-2.0 */
/* base: memory, sizes, statuses, texts, SHA-256, fp16, sines. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/half.h"
#include "base/log.h"
#include "base/sha256.h"
#include "base/sine.h"
#include "test_memory.h"

static void memory_is_aligned_and_readable_past_its_end(void **unused)
{
    (void)unused;
    test_memory memory = {0};
    tqkv_allocator custom = test_memory_allocator(&memory), mem;
    for (size_t kind = 0; kind < 2; kind++) {
        tqkvi_allocator_init(&mem, kind == 0 ? NULL : &custom);
        for (size_t n = 0; n < 200; n += 7) {
            uint8_t *p = tqkvi_alloc_zero(&mem, n);
            assert_non_null(p);
            assert_int_equal((uintptr_t)p % TQKV_ALIGN, 0);
            for (size_t i = 0; i < n + TQKV_ALIGN; i++)
                assert_int_equal(p[i], 0);
            tqkvi_free(&mem, p);
        }
    }
    assert_int_equal(memory.n_live, 0);
}

static void memory_that_cannot_exist_is_null(void **unused)
{
    (void)unused;
    test_memory memory = {.fail_call = 1};
    tqkv_allocator custom = test_memory_allocator(&memory), mem;
    tqkvi_allocator_init(&mem, NULL);
    assert_null(tqkvi_alloc(&mem, SIZE_MAX));
    assert_null(tqkvi_alloc(&mem, SIZE_MAX - TQKV_ALIGN + 1));
    assert_null(tqkvi_alloc_zero(&mem, SIZE_MAX - TQKV_ALIGN));
    assert_null(mem.alloc(mem.user, SIZE_MAX, TQKV_ALIGN));
    assert_null(tqkvi_alloc(&custom, 1));
    assert_null(tqkvi_alloc_zero(&custom, 1));
    tqkvi_free(&mem, NULL);
}

static void sizes_never_wrap(void **unused)
{
    (void)unused;
    size_t n = 1;
    assert_int_equal(tqkvi_size_mul(6, 7, &n), TQKV_OK);
    assert_int_equal(n, 42);
    assert_int_equal(tqkvi_size_mul(SIZE_MAX, 0, &n), TQKV_OK);
    assert_int_equal(n, 0);
    assert_int_equal(tqkvi_size_mul(SIZE_MAX / 2, 2, &n), TQKV_OK);
    assert_int_equal(n, SIZE_MAX - 1);
    assert_int_equal(tqkvi_size_mul(SIZE_MAX / 2 + 1, 2, &n), TQKV_ERR_NO_MEMORY);
    assert_int_equal(n, 0);
    assert_int_equal(tqkvi_size_add(SIZE_MAX - 1, 1, &n), TQKV_OK);
    assert_int_equal(n, SIZE_MAX);
    assert_int_equal(tqkvi_size_add(SIZE_MAX, 1, &n), TQKV_ERR_NO_MEMORY);
    assert_int_equal(n, 0);
}

static void every_status_has_its_own_text(void **unused)
{
    (void)unused;
    const char *unknown = tqkv_status_text(TQKV_STATUS_FORCE_32);
    assert_string_equal(tqkv_status_text((tqkv_status)-1), unknown);
    for (int i = 0; i <= TQKV_ERR_CANCELLED; i++) {
        const char *text = tqkv_status_text((tqkv_status)i);
        assert_true(strlen(text) > 5 && text[strlen(text) - 1] != '.');
        assert_string_not_equal(text, unknown);
        for (int k = 0; k < i; k++)
            assert_string_not_equal(text, tqkv_status_text((tqkv_status)k));
    }
    assert_string_equal(tqkv_status_text((tqkv_status)(TQKV_ERR_CANCELLED + 1)), unknown);
    assert_string_equal(tqkv_version(), TQKV_VERSION_STRING);
}

static void keep_text(void *user, tqkv_log_level level, const char *text)
{
    (void)snprintf(user, TQKVI_LOG_CHARS + 8, "%d %s", (int)level, text);
}

static void texts_are_one_line(void **unused)
{
    (void)unused;
    char text[TQKVI_LOG_CHARS + 8] = "";
    char longest[2 * TQKVI_LOG_CHARS];
    const tqkv_logger log = {.user = text, .write = keep_text};
    const tqkv_logger silent = {.user = text, .write = NULL};

    tqkvi_log(NULL, TQKV_LOG_ERROR, "dropped");
    tqkvi_log(&silent, TQKV_LOG_ERROR, "dropped");
    assert_string_equal(text, "");
    tqkvi_log(&log, TQKV_LOG_WARN, "a\n%s\t%d\x7f", "b\r", 7);
    assert_string_equal(text, "1 a b  7 ");
    memset(longest, 'x', sizeof(longest) - 1);
    longest[sizeof(longest) - 1] = '\0';
    tqkvi_log(&log, TQKV_LOG_ERROR, "%s", longest);
    assert_int_equal(strlen(text), TQKVI_LOG_CHARS - 1 + 2);
}

static void check_sha256(const char *message, size_t n, size_t repeat, const char *expected)
{
    uint8_t digest[TQKVI_SHA256_BYTES];
    char hex[2 * TQKVI_SHA256_BYTES + 1];
    tqkvi_sha256 sha;
    tqkvi_sha256_init(&sha);
    for (size_t i = 0; i < repeat; i++)
        tqkvi_sha256_update(&sha, message, n);
    tqkvi_sha256_digest(&sha, digest);
    for (size_t i = 0; i < sizeof(digest); i++)
        (void)snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    assert_string_equal(hex, expected);
}

static void sha256_gives_the_published_digests(void **unused)
{
    (void)unused;
    static const char two_blocks[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    check_sha256("", 0, 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    check_sha256("abc", 3, 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    check_sha256(two_blocks, 56, 1,
                 "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    check_sha256("a", 1, 1000000,
                 "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static void sha256_does_not_depend_on_the_pieces(void **unused)
{
    (void)unused;
    uint8_t message[300], whole[TQKVI_SHA256_BYTES], pieces[TQKVI_SHA256_BYTES];
    for (size_t i = 0; i < sizeof(message); i++)
        message[i] = (uint8_t)(i * 37);
    for (size_t n = 0; n <= sizeof(message); n++) {
        tqkvi_sha256 sha;
        tqkvi_sha256_init(&sha);
        tqkvi_sha256_update(&sha, message, n);
        tqkvi_sha256_digest(&sha, whole);
        tqkvi_sha256_init(&sha);
        for (size_t at = 0, step = 1; at < n; at += step, step = step % 91 + 17) {
            step = step < n - at ? step : n - at;
            tqkvi_sha256_update(&sha, message + at, step);
        }
        tqkvi_sha256_digest(&sha, pieces);
        assert_memory_equal(whole, pieces, sizeof(whole));
    }
}

/* The value of a finite f16, from its definition. */
static double half_value(uint16_t half)
{
    const int exponent = half >> 10 & 0x1f;
    const double mantissa = half & 0x3ff;
    const double size =
        exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024.0 + mantissa, exponent - 25);
    return half & 0x8000 ? -size : size;
}

static void every_half_comes_back(void **unused)
{
    (void)unused;
    for (uint32_t i = 0; i < 0x10000; i++) {
        const float value = tqkvi_half_to_float((uint16_t)i);
        if ((i & 0x7c00) != 0x7c00) {
            assert_true((double)value == half_value((uint16_t)i));
            assert_int_equal(signbit(value) != 0, i >> 15);
        } else if ((i & 0x3ff) == 0) {
            assert_true(isinf(value) && (signbit(value) != 0) == (i >> 15 != 0));
        } else {
            assert_true(isnan(value));
            assert_true(isnan(tqkvi_half_to_float(tqkvi_float_to_half(value))));
            continue;
        }
        assert_int_equal(tqkvi_float_to_half(value), i);
    }
}

static void halves_round_to_nearest_even(void **unused)
{
    (void)unused;
    for (uint32_t i = 0; i < 0x7c00; i++) {
        /* Beyond the largest half the next value would be 2^16. */
        const double low = half_value((uint16_t)i);
        const double high = i == 0x7bff ? 65536.0 : half_value((uint16_t)(i + 1));
        const float tie = (float)((low + high) / 2.0);
        const uint32_t even = i + (i & 1);
        for (int sign = 0; sign < 2; sign++) {
            const float s = sign ? -1.0f : 1.0f;
            const uint32_t bit = sign ? 0x8000 : 0;
            assert_int_equal(tqkvi_float_to_half(s * tie), bit | even);
            assert_int_equal(tqkvi_float_to_half(s * nextafterf(tie, 0.0f)), bit | i);
            assert_int_equal(tqkvi_float_to_half(s * nextafterf(tie, 1e9f)), bit | (i + 1));
        }
    }
    assert_int_equal(tqkvi_float_to_half(1e30f), 0x7c00);
    assert_int_equal(tqkvi_float_to_half(-INFINITY), 0xfc00);
    assert_int_equal(tqkvi_float_to_half(1e-30f), 0);
    assert_int_equal(tqkvi_float_to_half(-1e-45f), 0x8000);
}

static void check_angle(double angle)
{
    double s, c;
    tqkvi_sincos(angle, &s, &c);
    /* The libm of every test machine is good to an ulp. */
    assert_true(fabs(s - sin(angle)) < 1e-13);
    assert_true(fabs(c - cos(angle)) < 1e-13);
}

static void sines_are_exact_enough(void **unused)
{
    (void)unused;
    uint64_t state = 1;
    for (int i = 0; i < 200000; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const double u = (double)(state >> 11) / 9007199254740992.0 * 2.0 - 1.0;
        check_angle(ldexp(u, i % 34));
    }
    for (int n = -100; n <= 100; n++) {
        check_angle(n * 0.7853981633974483);
        check_angle(n * 1e-9);
    }
    check_angle(TQKVI_ANGLE_MAX);
    check_angle(-TQKVI_ANGLE_MAX);
    check_angle(-2147483648.0 * 3.9);
}

static void sines_of_anything_are_finite(void **unused)
{
    (void)unused;
    const double bad[] = {INFINITY, -INFINITY, NAN, 1e300, TQKVI_ANGLE_MAX * 1.01};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        double s = 7, c = 7;
        tqkvi_sincos(bad[i], &s, &c);
        assert_true(s == 0.0 && c == 1.0);
    }
}

/* The same bits everywhere: these were computed once and must never change. */
static void sines_have_fixed_bits(void **unused)
{
    (void)unused;
    uint8_t digest[TQKVI_SHA256_BYTES];
    char hex[2 * TQKVI_SHA256_BYTES + 1];
    tqkvi_sha256 sha;
    tqkvi_sha256_init(&sha);
    for (int i = 0; i < 20000; i++) {
        double pair[2];
        uint64_t bits[2];
        uint8_t bytes[16];
        tqkvi_sincos((i - 10000) * 0.37 * (i % 100 + 1) * (i % 7 == 0 ? 4096.0 : 1.0), &pair[0],
                     &pair[1]);
        memcpy(bits, pair, sizeof(bits));
        for (size_t k = 0; k < 16; k++)
            bytes[k] = (uint8_t)(bits[k / 8] >> k % 8 * 8);
        tqkvi_sha256_update(&sha, bytes, sizeof(bytes));
    }
    tqkvi_sha256_digest(&sha, digest);
    for (size_t i = 0; i < sizeof(digest); i++)
        (void)snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    assert_string_equal(hex, "65774bdb7823f2c66cc4591fca9286be7003faf3c5fe93b10c36e877637d14e0");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_is_aligned_and_readable_past_its_end),
        cmocka_unit_test(memory_that_cannot_exist_is_null),
        cmocka_unit_test(sizes_never_wrap),
        cmocka_unit_test(every_status_has_its_own_text),
        cmocka_unit_test(texts_are_one_line),
        cmocka_unit_test(sha256_gives_the_published_digests),
        cmocka_unit_test(sha256_does_not_depend_on_the_pieces),
        cmocka_unit_test(every_half_comes_back),
        cmocka_unit_test(halves_round_to_nearest_even),
        cmocka_unit_test(sines_are_exact_enough),
        cmocka_unit_test(sines_of_anything_are_finite),
        cmocka_unit_test(sines_have_fixed_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
