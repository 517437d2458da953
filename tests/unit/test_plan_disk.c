/* SPDX-License-Identifier: Apache-2.0 */
/* Plans on disk: whole or not there, and texts that name the file. */
#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "format/plan_file.h"
#include "test_memory.h"
#include "test_plan_make.h"

#define ALLOC_STEPS_MAX 200
#define PATH_CHARS 512

static char logged[2048]; /* all texts since the last clear_log */
static char folder[PATH_CHARS];

static void keep_text(void *user, tqkv_log_level level, const char *text)
{
    (void)user;
    (void)level;
    const size_t used = strlen(logged);
    (void)snprintf(logged + used, sizeof(logged) - used, "%s\n", text);
}

static const tqkv_logger logger = {.user = NULL, .write = keep_text};

static void expect_logged(const char *text)
{
    if (!strstr(logged, text))
        fail_msg("\"%s\" is not in \"%s\"", text, logged);
    logged[0] = '\0';
}

static const char *in_folder(const char *name)
{
    static char path[2 * PATH_CHARS];
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

static size_t count_files(void)
{
    DIR *dir = opendir(folder);
    size_t n = 0;
    assert_non_null(dir);
    for (const struct dirent *entry = readdir(dir); entry; entry = readdir(dir))
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void remove_file(const char *name)
{
    assert_int_equal(remove(in_folder(name)), 0);
}

static int set_up(void **state)
{
    const char *tmp = getenv("TMPDIR");
    static tqkv_plan *plan;
    const tqkv_plan_layer shape = test_shape(2, 1, 64, 64);
    (void)snprintf(folder, sizeof(folder), "%s/tqkv-disk-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder) || test_plan_make(NULL, 3, &shape, 1, 2, &plan) != TQKV_OK)
        return -1;
    *state = plan;
    return 0;
}

static int tear_down(void **state)
{
    tqkvi_plan_destroy(*state);
    return rmdir(folder); /* fails when a test left something behind */
}

static void check_loads(const tqkv_plan *plan, const char *path)
{
    tqkv_plan *again;
    assert_int_equal(tqkv_plan_load(path, &logger, &again), TQKV_OK);
    assert_memory_equal(again->fingerprint, plan->fingerprint, sizeof(plan->fingerprint));
    tqkv_plan_destroy(again);
    assert_string_equal(logged, "");
}

static void a_saved_plan_is_loaded(void **state)
{
    const tqkv_plan *plan = *state;
    char here[PATH_CHARS];
    assert_int_equal(tqkv_plan_save(plan, in_folder("a.tqkv"), &logger), TQKV_OK);
    check_loads(plan, in_folder("a.tqkv"));
    assert_int_equal(tqkv_plan_save(plan, in_folder("a.tqkv"), NULL), TQKV_OK); /* replaces */
    check_loads(plan, in_folder("a.tqkv"));
    assert_int_equal(count_files(), 1);
    remove_file("a.tqkv");

    assert_non_null(getcwd(here, sizeof(here)));
    assert_int_equal(chdir(folder), 0);
    assert_int_equal(tqkv_plan_save(plan, "b.tqkv", &logger), TQKV_OK); /* no folder in the name */
    check_loads(plan, "b.tqkv");
    assert_int_equal(chdir(here), 0);
    remove_file("b.tqkv");
}

static void arguments_are_checked(void **state)
{
    tqkv_plan *plan = (tqkv_plan *)1;
    assert_int_equal(tqkv_plan_save(NULL, "x", NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_save(*state, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_load(NULL, NULL, &plan), TQKV_ERR_INVALID_ARG);
    assert_null(plan);
    assert_int_equal(tqkv_plan_load("x", NULL, NULL), TQKV_ERR_INVALID_ARG);
}

static void files_left_by_others_are_not_touched(void **state)
{
    char name[PATH_CHARS];
    (void)snprintf(name, sizeof(name), "a.tqkv.tmp-%u-0", (unsigned)getpid());
    FILE *file = fopen(in_folder(name), "wb");
    assert_non_null(file);
    assert_int_equal(fputs("mine", file) < 0, 0);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(tqkv_plan_save(*state, in_folder("a.tqkv"), &logger), TQKV_OK);
    check_loads(*state, in_folder("a.tqkv"));
    struct stat info;
    assert_int_equal(stat(in_folder(name), &info), 0);
    assert_int_equal(info.st_size, 4);
    remove_file(name);
    remove_file("a.tqkv");
}

static void a_folder_that_is_missing_is_named(void **state)
{
    assert_int_equal(tqkv_plan_save(*state, in_folder("none/a.tqkv"), &logger), TQKV_ERR_IO);
    expect_logged("none/a.tqkv");
    assert_int_equal(tqkv_plan_save(*state, in_folder("none/a.tqkv"), &logger), TQKV_ERR_IO);
    expect_logged(strerror(ENOENT));
}

static void a_folder_is_not_replaced(void **state)
{
    assert_int_equal(mkdir(in_folder("a.tqkv"), 0700), 0);
    assert_int_equal(tqkv_plan_save(*state, in_folder("a.tqkv"), &logger), TQKV_ERR_IO);
    expect_logged("cannot replace");
    assert_int_equal(count_files(), 1);
    tqkv_plan *plan;
    assert_int_equal(tqkv_plan_load(in_folder("a.tqkv"), &logger, &plan), TQKV_ERR_IO);
    expect_logged("a.tqkv");
    assert_int_equal(rmdir(in_folder("a.tqkv")), 0);
}

static void a_full_disk_leaves_the_old_file(void **state)
{
    const tqkv_plan *plan = *state;
    struct rlimit before;
    assert_int_equal(tqkv_plan_save(plan, in_folder("a.tqkv"), &logger), TQKV_OK);

    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    const struct rlimit low = {.rlim_cur = 5000, .rlim_max = before.rlim_max};
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    const tqkv_status status = tqkv_plan_save(plan, in_folder("a.tqkv"), &logger);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    (void)signal(SIGXFSZ, handler);

    assert_int_equal(status, TQKV_ERR_IO);
    expect_logged(strerror(EFBIG));
    assert_int_equal(count_files(), 1);
    check_loads(plan, in_folder("a.tqkv"));
    remove_file("a.tqkv");
}

static void a_missing_file_is_named(void **unused)
{
    (void)unused;
    tqkv_plan *plan = (tqkv_plan *)1;
    assert_int_equal(tqkv_plan_load(in_folder("none.tqkv"), &logger, &plan), TQKV_ERR_IO);
    assert_null(plan);
    expect_logged("none.tqkv");
}

static void write_bytes(const char *name, const void *bytes, size_t n, long length)
{
    FILE *file = fopen(in_folder(name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(truncate(in_folder(name), length), 0);
}

static void other_files_take_no_memory(void **unused)
{
    (void)unused;
    const long huge = 1L << 36; /* sparse */
    uint8_t start[24] = {0};
    test_memory memory = {.fail_call = 1};
    const tqkv_allocator mem = test_memory_allocator(&memory);
    tqkv_plan *plan;
    write_bytes("model.gguf", "GGUF", 4, huge);
    assert_int_equal(tqkvi_plan_load_file(&mem, in_folder("model.gguf"), &logger, &plan),
                     TQKV_ERR_CORRUPT);
    expect_logged("not a .tqkv plan");
    remove_file("model.gguf");

    write_bytes("empty", "", 0, 0);
    assert_int_equal(tqkvi_plan_load_file(&mem, in_folder("empty"), &logger, &plan),
                     TQKV_ERR_CORRUPT);
    expect_logged("empty");
    remove_file("empty");

    memcpy(start, TQKVI_PLAN_MAGIC, TQKVI_PLAN_MAGIC_BYTES);
    start[8] = 1;
    write_bytes("new.tqkv", start, sizeof(start), 200);
    assert_int_equal(tqkvi_plan_load_file(&mem, in_folder("new.tqkv"), &logger, &plan),
                     TQKV_ERR_VERSION);
    expect_logged("new.tqkv");
    remove_file("new.tqkv");
    assert_int_equal(memory.n_calls, 0);
}

static void a_cut_file_is_refused(void **state)
{
    tqkv_plan *plan;
    assert_int_equal(tqkv_plan_save(*state, in_folder("a.tqkv"), &logger), TQKV_OK);
    assert_int_equal(truncate(in_folder("a.tqkv"), 1000), 0);
    assert_int_equal(tqkv_plan_load(in_folder("a.tqkv"), &logger, &plan), TQKV_ERR_CORRUPT);
    expect_logged("length at byte 16");
    remove_file("a.tqkv");
}

static void running_out_of_memory_leaves_nothing(void **unused)
{
    (void)unused;
    const tqkv_plan_layer shape = test_shape(2, 1, 16, 16);
    tqkv_status status = TQKV_ERR_NO_MEMORY;
    for (size_t step = 1; status != TQKV_OK && step < ALLOC_STEPS_MAX; step++) {
        test_memory memory = {0};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_plan *plan, *again = NULL;
        assert_int_equal(test_plan_make(&mem, 1, &shape, 1, 1, &plan), TQKV_OK);
        const size_t n_live = memory.n_live;
        memory.fail_call = memory.n_calls + step;
        status = tqkv_plan_save(plan, in_folder("a.tqkv"), &logger);
        if (status == TQKV_OK) {
            status = tqkvi_plan_load_file(&mem, in_folder("a.tqkv"), &logger, &again);
            remove_file("a.tqkv");
        }
        assert_true(status == TQKV_OK || status == TQKV_ERR_NO_MEMORY);
        tqkvi_plan_destroy(again);
        assert_int_equal(memory.n_live, n_live);
        tqkvi_plan_destroy(plan);
        assert_int_equal(count_files(), 0);
    }
    assert_int_equal(status, TQKV_OK);
    logged[0] = '\0';
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_saved_plan_is_loaded),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(files_left_by_others_are_not_touched),
        cmocka_unit_test(a_folder_that_is_missing_is_named),
        cmocka_unit_test(a_folder_is_not_replaced),
        cmocka_unit_test(a_full_disk_leaves_the_old_file),
        cmocka_unit_test(a_missing_file_is_named),
        cmocka_unit_test(other_files_take_no_memory),
        cmocka_unit_test(a_cut_file_is_refused),
        cmocka_unit_test(running_out_of_memory_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
