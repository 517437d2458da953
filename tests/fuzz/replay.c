/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a fuzz target over stored files instead of libFuzzer's: every file named, every file of
 * every folder named, and every prefix of each. Normal test runs use it.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PATH_CHARS_MAX 4096
#define PREFIXES_MAX 512 /* long files: this many prefixes, evenly spaced */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned n_inputs;

/* Exactly size bytes on the heap, so that a sanitizer sees one byte too many. */
static void run_copy(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size > 0 ? size : 1);

    if (!copy) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    if (size > 0)
        memcpy(copy, data, size);
    (void)LLVMFuzzerTestOneInput(copy, size);
    n_inputs++;
    free(copy);
}

static void run_file(const char *path, size_t size)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(size > 0 ? size : 1);

    if (!file || !data || fread(data, 1, size, file) != size) {
        fprintf(stderr, "%s: cannot be read\n", path);
        exit(1);
    }
    fclose(file);
    run_copy(data, size);
    const size_t step = size / PREFIXES_MAX + 1;
    for (size_t n = 0; n < size; n += step)
        run_copy(data, n);
    free(data);
}

static void run_path(const char *path)
{
    struct stat info;

    if (stat(path, &info) != 0) {
        fprintf(stderr, "%s: not found\n", path);
        exit(1);
    }
    if (!S_ISDIR(info.st_mode)) {
        run_file(path, (size_t)info.st_size);
        return;
    }
    DIR *folder = opendir(path);
    const struct dirent *entry;
    while (folder && (entry = readdir(folder)) != NULL) {
        char child[PATH_CHARS_MAX];
        const int n = snprintf(child, sizeof(child), "%s/%s", path, entry->d_name);
        if (entry->d_name[0] != '.' && n > 0 && (size_t)n < sizeof(child))
            run_path(child);
    }
    if (folder)
        closedir(folder);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        run_path(argv[i]);
    printf("%u inputs replayed\n", n_inputs);
    return n_inputs > 0 ? 0 : 1;
}
