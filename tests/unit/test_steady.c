/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A decoding step in a store that is in use: begin, put, attend, commit. It asks no allocator, and
 * it runs where the kernel kills whoever makes a system call (seccomp's strict mode allows read, write
 * and exit only). The library names no lock at all: see tests/lint.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <signal.h>
#include <stdlib.h>

#include "test_arrays.h"
#include "test_memory.h"
#include "test_store_make.h"

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HAS_SECCOMP 1
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#else
#define HAS_SECCOMP 0
#endif

enum {
    N_HEADS = 8,
    N_KV_HEADS = 2,
    DIM = 64,
    ROW = N_KV_HEADS * DIM,
    N_CELLS = 1024,
    N_WARM = 400,     /* every tier is full, every kernel chosen */
    N_STEPS = N_CELLS /* over frames and blocks, and around the end of the cells */
};

typedef struct decoder {
    tqkv_plan *plan;
    tqkv_store *store;
    tqkv_batch *batch;
    float *rows, *q, *out;
    void *scratch;
    int64_t n_done;
} decoder;

static void decoder_init(decoder *d, const tqkv_allocator *mem)
{
    static const uint32_t tier_tokens[] = {32, 96, 128};
    const tqkv_plan_layer shape = test_shape(N_HEADS, N_KV_HEADS, DIM, DIM);
    tqkv_store_config config;
    test_random random = {7};

    *d = (decoder){0};
    assert_int_equal(test_tiered_plan(7, &shape, 4, tier_tokens, 4, 64, &d->plan), TQKV_OK);
    tqkv_store_config_init(&config);
    config.plan = d->plan;
    config.n_cells = N_CELLS;
    config.n_streams = 1;
    config.mem = mem;
    assert_int_equal(tqkv_store_create(&config, &d->store), TQKV_OK);
    assert_int_equal(tqkv_batch_create(mem, &d->batch), TQKV_OK);
    d->rows = test_random_floats(&random, ROW, 1);
    d->q = test_random_floats(&random, N_HEADS * DIM, 1);
    d->out = test_aligned(N_HEADS * DIM * sizeof(float));
    d->scratch = test_aligned(tqkv_store_scratch_bytes(d->store, 1, 1));
}

static void decoder_deinit(decoder *d)
{
    tqkv_batch_destroy(d->batch);
    tqkv_store_destroy(d->store);
    tqkv_plan_destroy(d->plan);
    free(d->rows);
    free(d->q);
    free(d->out);
    free(d->scratch);
}

static tqkv_status step(decoder *d)
{
    const int64_t cell = d->n_done % N_CELLS;
    const int32_t position = (int32_t)d->n_done;
    tqkv_attend_args args;

    tqkv_attend_args_init(&args);
    args.n_q = 1;
    args.n_cells = d->n_done < N_CELLS ? (uint32_t)d->n_done + 1 : N_CELLS;
    args.q = d->q;
    args.out = d->out;
    args.q_head_stride = args.out_head_stride = DIM;
    args.q_token_stride = args.out_token_stride = N_HEADS * DIM;
    args.scale = 0.125F;
    args.causal = 1;
    args.scratch = d->scratch;
    d->n_done++;
    TQKV_TRY(tqkv_batch_begin(d->batch, d->store, &cell, &position, 1));
    TQKV_TRY(tqkv_batch_put(d->batch, TQKV_SIDE_K, d->rows, ROW));
    TQKV_TRY(tqkv_batch_put(d->batch, TQKV_SIDE_V, d->rows, ROW));
    TQKV_TRY(tqkv_store_attend(d->store, d->batch, &args, NULL));
    return tqkv_batch_commit(d->batch, NULL);
}

static tqkv_status run(decoder *d, size_t n)
{
    for (size_t i = 0; i < n; i++)
        TQKV_TRY(step(d));
    return TQKV_OK;
}

static void test_no_allocation(void **state)
{
    test_memory memory = {0};
    const tqkv_allocator mem = test_memory_allocator(&memory);
    decoder d;

    (void)state;
    decoder_init(&d, &mem);
    assert_int_equal(run(&d, N_WARM), TQKV_OK);
    const size_t n_before = memory.n_calls, n_live = memory.n_live;
    assert_int_equal(run(&d, N_STEPS), TQKV_OK);
    assert_int_equal(memory.n_calls, n_before);
    assert_int_equal(memory.n_live, n_live);
    decoder_deinit(&d);
}

#if HAS_SECCOMP
enum { EXIT_NO_SECCOMP = 77 };

/* Ends a process in strict mode; exit() would ask for more. */
static void leave(int status)
{
    (void)syscall(SYS_exit, status);
}

static void be_strict(void)
{
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0)
        leave(EXIT_NO_SECCOMP);
}

/* Status of a child as waitpid gives it; skips where a child cannot be strict. */
static int ended(pid_t child)
{
    int status;

    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_NO_SECCOMP)
        skip();
    return status;
}

static void test_no_system_call(void **state)
{
    decoder d;

    (void)state;
    decoder_init(&d, NULL); /* cells are mapped by the operating system */
    assert_int_equal(run(&d, N_WARM), TQKV_OK);
    const pid_t child = fork();
    if (child == 0) {
        be_strict();
        leave(run(&d, N_STEPS) == TQKV_OK ? 0 : 1);
    }
    const int status = ended(child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    decoder_deinit(&d);
}

/* The test above can fail. */
static void test_a_system_call_is_seen(void **state)
{
    (void)state;
    const pid_t child = fork();
    if (child == 0) {
        be_strict();
        (void)syscall(SYS_getppid);
        leave(0);
    }
    const int status = ended(child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGKILL);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_allocation),
#if HAS_SECCOMP
        cmocka_unit_test(test_no_system_call),
        cmocka_unit_test(test_a_system_call_is_seen),
#endif
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
