/* SPDX-License-Identifier: Apache-2.0 */
/* Committed files decode to committed bytes forever; make_golden.py says what they hold. */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "format/bytes.h"
#include "turboquant/turboquant.h"

#define FOLDER TQKV_SOURCE_DIR "/tests/golden/v0/"
#define CASE_HEADER_BYTES 32
#define PATH_CHARS 1024

typedef struct content {
    uint8_t *bytes;
    size_t n;
} content;

static content read_all(const char *path)
{
    content c = {NULL, 0};
    FILE *file = fopen(path, "rb");
    if (!file)
        fail_msg("%s cannot be opened", path);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    c.n = (size_t)ftell(file);
    rewind(file);
    c.bytes = malloc(c.n + 1);
    assert_non_null(c.bytes);
    assert_int_equal(fread(c.bytes, 1, c.n, file), c.n);
    assert_int_equal(fclose(file), 0);
    return c;
}

static void plans_are_read_and_written_as_they_were(void **unused)
{
    (void)unused;
    static const char *const names[] = {FOLDER "plan.tqkv", FOLDER "tiny.tqkv"};
    char path[PATH_CHARS];
    const char *tmp = getenv("TMPDIR");
    (void)snprintf(path, sizeof(path), "%s/tqkv-golden-XXXXXX", tmp ? tmp : "/tmp");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)fclose(fdopen(fd, "wb"));
    for (size_t i = 0; i < 2; i++) {
        const content before = read_all(names[i]);
        tqkv_plan *plan;
        assert_int_equal(tqkv_plan_read(before.bytes, before.n, NULL, &plan), TQKV_OK);
        assert_int_equal(tqkv_plan_save(plan, path, NULL), TQKV_OK);
        const content after = read_all(path);
        assert_int_equal(before.n, after.n);
        assert_memory_equal(before.bytes, after.bytes, before.n);
        tqkv_plan_destroy(plan);
        free(before.bytes);
        free(after.bytes);
    }
    assert_int_equal(remove(path), 0);
}

/* The floats of a file, for passing on. */
static float *take_floats(const uint8_t **at, size_t n)
{
    float *values = malloc(n * sizeof(*values));
    assert_non_null(values);
    for (size_t i = 0; i < n; i++)
        values[i] = tqkvi_float_of_bits(tqkvi_load_u32(*at + 4 * i));
    *at += 4 * n;
    return values;
}

/* Checks one case of rows.bin and moves on to the next. */
static void check_case(const tqkv_plan *plan, const uint8_t **at)
{
    uint32_t field[8];
    for (size_t i = 0; i < 8; i++)
        field[i] = tqkvi_load_u32(*at + 4 * i);
    *at += CASE_HEADER_BYTES;
    const uint32_t layer = field[0], head = field[2], tier = field[3];
    const tqkv_side side = (tqkv_side)field[1];
    const int32_t base = (int32_t)field[4];
    const size_t n_rows = field[5], dim = field[6], row_bytes = field[7],
                 n_codes = n_rows * row_bytes;

    float *input = take_floats(at, n_rows * dim);
    const uint8_t *scales = *at, *codes = *at + n_rows;
    *at += n_rows + n_codes;
    float *expected = take_floats(at, n_rows * dim);

    tqkv_codec *codec;
    uint8_t *got_scales = malloc(n_rows), *got_codes = malloc(n_codes + 1);
    float *decoded = malloc(n_rows * dim * sizeof(*decoded));
    assert_true(got_scales && got_codes && decoded);
    assert_int_equal(tqkv_codec_create(plan, layer, NULL, NULL, &codec), TQKV_OK);
    assert_int_equal(tqkv_codec_row_bytes(codec, head, side, tier), row_bytes);
    assert_int_equal(tqkv_codec_encode(codec, head, side, tier, base, input, dim, n_rows,
                                       got_scales, got_codes, NULL),
                     TQKV_OK);
    assert_memory_equal(got_scales, scales, n_rows);
    assert_memory_equal(got_codes, codes, n_codes);
    assert_int_equal(
        tqkv_codec_decode(codec, head, side, tier, base, scales, codes, n_rows, decoded, dim),
        TQKV_OK);
    assert_memory_equal(decoded, expected, n_rows * dim * sizeof(*decoded));

    tqkv_codec_destroy(codec);
    free(input);
    free(expected);
    free(got_scales);
    free(got_codes);
    free(decoded);
}

static void rows_have_the_bytes_that_they_had(void **unused)
{
    (void)unused;
    const content file = read_all(FOLDER "plan.tqkv"), rows = read_all(FOLDER "rows.bin");
    tqkv_plan *plan;
    size_t n_cases = 0;
    assert_int_equal(tqkv_plan_read(file.bytes, file.n, NULL, &plan), TQKV_OK);
    for (const uint8_t *at = rows.bytes; at < rows.bytes + rows.n; n_cases++)
        check_case(plan, &at);
    assert_int_equal(n_cases, 8);
    tqkv_plan_destroy(plan);
    free(file.bytes);
    free(rows.bytes);
}

static void keep_text(void *user, tqkv_log_level level, const char *text)
{
    (void)level;
    (void)snprintf(user, PATH_CHARS, "%s", text);
}

static void bad_files_are_refused_with_their_status(void **unused)
{
    (void)unused;
    DIR *folder = opendir(FOLDER "refused");
    size_t n_files = 0;
    assert_non_null(folder);
    for (const struct dirent *entry = readdir(folder); entry; entry = readdir(folder)) {
        if (entry->d_name[0] == '.')
            continue;
        char path[PATH_CHARS], text[PATH_CHARS] = "";
        const tqkv_logger log = {.user = text, .write = keep_text};
        (void)snprintf(path, sizeof(path), FOLDER "refused/%s", entry->d_name);
        const tqkv_status expected =
            strncmp(entry->d_name, "version", 7) == 0 ? TQKV_ERR_VERSION : TQKV_ERR_CORRUPT;
        const content file = read_all(path);
        tqkv_plan *plan = NULL;
        if (tqkv_plan_read(file.bytes, file.n, &log, &plan) != expected || plan ||
            !strstr(text, " at byte "))
            fail_msg("%s: \"%s\"", entry->d_name, text);
        if (tqkv_plan_load(path, &log, &plan) != expected || plan || !strstr(text, entry->d_name))
            fail_msg("%s: \"%s\"", entry->d_name, text);
        free(file.bytes);
        n_files++;
    }
    closedir(folder);
    assert_int_equal(n_files, 25);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans_are_read_and_written_as_they_were),
        cmocka_unit_test(rows_have_the_bytes_that_they_had),
        cmocka_unit_test(bad_files_are_refused_with_their_status),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
