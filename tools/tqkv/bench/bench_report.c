/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "bench.h"
#include "json_file.h"

void bench_print_head(FILE *out, const bench_row *row)
{
    fprintf(out, "\n%s of %u after %u tokens, %u threads, %u layers; memory is read at %.1f GB/s\n",
            row->mode, row->n_q, row->depth, row->n_threads, row->n_layers, row->memory / 1e9);
    fprintf(out, "%-12s %6s %7s  %26s  %22s  %14s\n", "cache", "bits", "error",
            "us a layer (quartiles)", "times f16 (quartiles)", "GB/s of cache");
}

void bench_print_row(FILE *out, const bench_row *row)
{
    char error[16] = "-", bits[16] = "-", ratio[64] = "-";
    if (row->error >= 0)
        snprintf(error, sizeof(error), "%.4f", row->error);
    if (row->bits > 0)
        snprintf(bits, sizeof(bits), "%.2f", row->bits);
    if (row->ratio.median > 0)
        snprintf(ratio, sizeof(ratio), "%.2f (%.2f..%.2f)", row->ratio.median, row->ratio.low,
                 row->ratio.high);
    fprintf(out, "%-12s %6s %7s  %9.1f (%.1f..%.1f)  %22s  %6.1f, %3.0f %%\n", row->cache, bits,
            error, 1e6 * row->seconds.median, 1e6 * row->seconds.low, 1e6 * row->seconds.high,
            ratio, row->bytes / row->seconds.median / 1e9,
            100 * row->bytes / row->seconds.median / row->memory);
}

static json_t *or_null(double value, bool is_known)
{
    return is_known ? json_real_short(value, 5) : json_null();
}

json_t *bench_row_json(const bench_row *row)
{
    const bool has_f16 = row->ratio.median > 0;
    return json_pack(
        "{s:s, s:s, s:i, s:i, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "mode",
        row->mode, "cache", row->cache, "depth", (int)row->depth, "n_q", (int)row->n_q, "threads",
        (int)row->n_threads, "layers", (int)row->n_layers, "bits",
        or_null(row->bits, row->bits > 0), "error", or_null(row->error, row->error >= 0), "seconds",
        json_real_short(row->seconds.median, 5), "seconds_low",
        json_real_short(row->seconds.low, 5), "seconds_high", json_real_short(row->seconds.high, 5),
        "ratio_f16", or_null(row->ratio.median, has_f16), "ratio_low",
        or_null(row->ratio.low, has_f16), "ratio_high", or_null(row->ratio.high, has_f16),
        "bytes_per_s", json_real_short(row->bytes / row->seconds.median, 5), "memory_bytes_per_s",
        json_real_short(row->memory, 5));
}

/* The processor's name as Linux tells it; the last one where there are several kinds. */
static void read_cpu_name(char *name, size_t n_chars)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, n_chars, "unknown");
    while (file && fgets(line, sizeof(line), file)) {
        const char *colon = strchr(line, ':');
        if (colon && strncmp(line, "model name", 10) == 0)
            snprintf(name, n_chars, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
    }
    if (file)
        fclose(file);
}

json_t *bench_machine_json(void)
{
    char cpu[128];
    read_cpu_name(cpu, sizeof(cpu));
    return json_pack("{s:s, s:i, s:s, s:s}", "cpu", cpu, "processors", (int)tool_n_processors(),
#if defined(__clang__)
                     "compiler", __VERSION__,
#else
                     "compiler", "GCC " __VERSION__,
#endif
                     "version", tqkv_version());
}
