/* SPDX-License-Identifier: Apache-2.0 */
/* What `tqkv calibrate` lets a plan lose, and how many bits it gives to one that loses more. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../../tools/tqkv/gate_limit.c"

static void assert_near(double got, double wanted)
{
    assert_true(fabs(got - wanted) <= 1e-9);
}

static void limits_of_named_profiles(void **unused)
{
    (void)unused;
    assert_near(gate_limit(2.0), 0.12);
    assert_near(gate_limit(3.2), 0.03);
    assert_near(gate_limit(4.5), 0.015);
}

static void limits_between_are_geometric_means(void **unused)
{
    (void)unused;
    assert_near(gate_limit(2.6), 0.06);
    assert_near(gate_limit(3.85), sqrt(0.03 * 0.015));
}

static void limits_beyond_go_on_alike(void **unused)
{
    (void)unused;
    assert_near(gate_limit(0.8), 0.48);
    assert_near(gate_limit(5.8), 0.0075);
    for (double bits = 0.5; bits < 8; bits += 0.1)
        assert_true(gate_limit(bits) > gate_limit(bits + 0.1));
}

static void no_limit_is_below_what_can_be_measured(void **unused)
{
    (void)unused;
    assert_near(gate_limit(16), LIMIT_LEAST);
}

static void bits_grow_by_small_steps_to_an_end(void **unused)
{
    double bits = 3.2;
    int n = 0;

    (void)unused;
    for (double next; (next = gate_next_bits(3.2, bits, 1.01)) > 0; bits = next, n++) {
        assert_true(next > bits && next <= bits * 1.05 + 1e-9);
        assert_true(n < 10);
    }
    assert_near(bits, 3.2 * 1.4);
    assert_int_equal(n, 7);
}

static void steps_that_cannot_do_are_left_out(void **unused)
{
    (void)unused;
    assert_near(gate_next_bits(3.2, 3.2, 1.9), 3.36); /* a sixth of a bit may halve it */
    assert_near(gate_next_bits(3.2, 3.2, 4), 3.2 * 1.05 * 1.05 * 1.05);
    assert_near(gate_next_bits(3.2, 3.2, 1e9), 4.48);
    assert_near(gate_next_bits(3.2, 3.2, INFINITY), 4.48);
}

static void there_is_an_end_at_f16(void **unused)
{
    (void)unused;
    assert_near(gate_next_bits(15.9, 15.9, 2), 16);
    assert_near(gate_next_bits(16, 16, 2), 0);
}

static void what_is_no_number_still_ends(void **unused)
{
    double bits = 2;

    (void)unused;
    for (int i = 0; i < 7; i++)
        bits = gate_next_bits(2, bits, NAN);
    assert_near(bits, 2.8);
    assert_near(gate_next_bits(2, bits, NAN), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(limits_of_named_profiles),
        cmocka_unit_test(limits_between_are_geometric_means),
        cmocka_unit_test(limits_beyond_go_on_alike),
        cmocka_unit_test(no_limit_is_below_what_can_be_measured),
        cmocka_unit_test(bits_grow_by_small_steps_to_an_end),
        cmocka_unit_test(steps_that_cannot_do_are_left_out),
        cmocka_unit_test(there_is_an_end_at_f16),
        cmocka_unit_test(what_is_no_number_still_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
