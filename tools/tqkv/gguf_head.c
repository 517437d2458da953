/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads keys and values of a GGUF header and keeps the ones asked for. Sizes found in the file
 * are checked against the file's length before they are used.
 */
#include "gguf_head.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "tool.h"

enum value_type {
    VALUE_U8,
    VALUE_I8,
    VALUE_U16,
    VALUE_I16,
    VALUE_U32,
    VALUE_I32,
    VALUE_F32,
    VALUE_BOOL,
    VALUE_STRING,
    VALUE_ARRAY,
    VALUE_U64,
    VALUE_I64,
    VALUE_F64,
    VALUE_TYPES
};
static const uint8_t value_bytes[VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

#define KEY_CHARS 128
#define KEYS_MAX 100000u

typedef struct reader {
    FILE *file;
    const char *path;
    uint64_t left; /* bytes of the file not read yet */
    char key[KEY_CHARS];
    gguf_head *head;
    uint32_t n_heads_all, n_kv_heads_all, n_ahead; /* values for all layers */
} reader;

static int truncated(const reader *r)
{
    return tool_error("%s: the GGUF header ends early (after key '%s'); is the file complete?",
                      r->path, r->key);
}

static int read_bytes(reader *r, void *out, uint64_t n)
{
    if (n > r->left || fread(out, 1, (size_t)n, r->file) != n)
        return truncated(r);
    r->left -= n;
    return TOOL_OK;
}

static int skip_bytes(reader *r, uint64_t n)
{
    if (n > r->left || fseeko(r->file, (off_t)n, SEEK_CUR) != 0)
        return truncated(r);
    r->left -= n;
    return TOOL_OK;
}

static int read_u64(reader *r, uint64_t *out)
{
    uint8_t bytes[8];
    const int rc = read_bytes(r, bytes, 8);
    *out = 0;
    for (int i = 7; i >= 0 && rc == TOOL_OK; i--)
        *out = *out << 8 | bytes[i];
    return rc;
}

static int read_u32(reader *r, uint32_t *out)
{
    uint8_t b[4] = {0};
    const int rc = read_bytes(r, b, 4);
    *out = b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
    return rc;
}

/* Keeps what fits; the rest is skipped. */
static int read_text(reader *r, char *out, size_t out_chars)
{
    uint64_t n;
    int rc = read_u64(r, &n);
    const uint64_t n_kept = n < out_chars - 1 ? n : out_chars - 1;
    if (rc == TOOL_OK)
        rc = read_bytes(r, out, n_kept);
    if (rc == TOOL_OK)
        rc = skip_bytes(r, n - n_kept);
    out[rc == TOOL_OK ? n_kept : 0] = '\0';
    return rc;
}

/* An unsigned value of any whole type; others and negative ones read as 0. */
static int read_whole(reader *r, uint32_t type, uint32_t *out)
{
    uint8_t bytes[8] = {0};
    const int rc = read_bytes(r, bytes, value_bytes[type]);
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | bytes[i];
    if (type == VALUE_F32 || type == VALUE_F64 || value > UINT32_MAX)
        value = 0;
    *out = (uint32_t)value;
    return rc;
}

static int skip_strings(reader *r, uint64_t n)
{
    int rc = TOOL_OK;
    for (uint64_t i = 0; i < n && rc == TOOL_OK; i++) {
        uint64_t n_bytes;
        rc = read_u64(r, &n_bytes);
        if (rc == TOOL_OK)
            rc = skip_bytes(r, n_bytes);
    }
    return rc;
}

/* per_layer: where whole numbers of the array are kept, or NULL. */
static int read_array(reader *r, uint32_t *per_layer)
{
    uint32_t type;
    uint64_t n;
    int rc = read_u32(r, &type);
    if (rc == TOOL_OK)
        rc = read_u64(r, &n);
    if (rc != TOOL_OK)
        return rc;
    if (type == VALUE_STRING)
        return skip_strings(r, n);
    if (type >= VALUE_TYPES || type == VALUE_ARRAY)
        return tool_error("%s: key '%s': array of unknown type %u", r->path, r->key, type);
    if (n > r->left)
        return truncated(r);
    const uint64_t n_kept = !per_layer ? 0 : n < GGUF_LAYERS_MAX ? n : GGUF_LAYERS_MAX;
    for (uint64_t i = 0; i < n_kept && rc == TOOL_OK; i++)
        rc = read_whole(r, type, &per_layer[i]);
    return rc == TOOL_OK ? skip_bytes(r, (n - n_kept) * value_bytes[type]) : rc;
}

/* Where a key's number goes. per_layer: set where the key may be an array too. */
static uint32_t *number_place(reader *r, uint32_t **per_layer)
{
    gguf_head *head = r->head;
    const size_t n_arch = strlen(head->arch);
    *per_layer = NULL;
    if (!n_arch || strncmp(r->key, head->arch, n_arch) != 0 || r->key[n_arch] != '.')
        return NULL;
    const char *key = r->key + n_arch + 1;
    if (strcmp(key, "attention.head_count") == 0) {
        *per_layer = head->n_heads;
        return &r->n_heads_all;
    }
    if (strcmp(key, "attention.head_count_kv") == 0) {
        *per_layer = head->n_kv_heads;
        return &r->n_kv_heads_all;
    }
    const struct {
        const char *key;
        uint32_t *place;
    } places[] = {
        {"block_count", &head->n_layers},
        {"nextn_predict_layers", &r->n_ahead},
        {"embedding_length", &head->n_embd},
        {"context_length", &head->n_ctx_train},
        {"attention.sliding_window", &head->window},
        {"attention.key_length", &head->k_dim},
        {"attention.value_length", &head->v_dim},
        {"attention.key_length_swa", &head->k_dim_swa},
        {"attention.value_length_swa", &head->v_dim_swa},
    };
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        if (strcmp(key, places[i].key) == 0)
            return places[i].place;
    }
    head->is_latent = head->is_latent || strcmp(key, "attention.kv_lora_rank") == 0;
    return NULL;
}

static int read_value(reader *r)
{
    uint32_t type, unused, *per_layer;
    const int rc = read_u32(r, &type);
    if (rc != TOOL_OK)
        return rc;
    uint32_t *place = number_place(r, &per_layer);
    if (type == VALUE_ARRAY)
        return read_array(r, per_layer);
    if (type == VALUE_STRING) {
        char skipped[2];
        if (strcmp(r->key, "general.architecture") == 0)
            return read_text(r, r->head->arch, sizeof(r->head->arch));
        if (strcmp(r->key, "general.name") == 0)
            return read_text(r, r->head->name, sizeof(r->head->name));
        return read_text(r, skipped, sizeof(skipped));
    }
    if (type >= VALUE_TYPES)
        return tool_error("%s: key '%s': unknown type %u", r->path, r->key, type);
    return read_whole(r, type, place ? place : &unused);
}

static int read_keys(reader *r)
{
    char magic[4];
    uint32_t version;
    uint64_t n_tensors, n_keys;
    if (r->left < 24 || read_bytes(r, magic, 4) != TOOL_OK || memcmp(magic, "GGUF", 4) != 0)
        return tool_error("%s is not a GGUF file (it does not start with 'GGUF')", r->path);
    int rc = read_u32(r, &version);
    if (rc == TOOL_OK && (version < 2 || version > 3))
        return tool_error("%s: GGUF version %u; 2 and 3 are understood", r->path, version);
    if (rc == TOOL_OK)
        rc = read_u64(r, &n_tensors);
    if (rc == TOOL_OK)
        rc = read_u64(r, &n_keys);
    if (rc == TOOL_OK && n_keys > KEYS_MAX)
        return tool_error("%s: the GGUF header claims %llu keys", r->path,
                          (unsigned long long)n_keys);
    for (uint64_t i = 0; i < n_keys && rc == TOOL_OK; i++) {
        char key[KEY_CHARS];
        rc = read_text(r, key, sizeof(key));
        memcpy(r->key, key, sizeof(key));
        if (rc == TOOL_OK)
            rc = read_value(r);
    }
    return rc;
}

/* Fills in what follows from other fields and refuses what no plan can be made for. */
static int complete(reader *r)
{
    gguf_head *head = r->head;
    if (!*head->arch)
        return tool_error("%s: the key 'general.architecture' is missing", r->path);
    if (head->n_layers > r->n_ahead)
        head->n_layers -= r->n_ahead;
    if (!head->n_layers || head->n_layers > GGUF_LAYERS_MAX)
        return tool_error("%s: '%s.block_count' is %u", r->path, head->arch, head->n_layers);
    bool has_attention = false;
    for (uint32_t i = 0; i < head->n_layers; i++) {
        if (r->n_heads_all)
            head->n_heads[i] = r->n_heads_all;
        if (r->n_kv_heads_all)
            head->n_kv_heads[i] = r->n_kv_heads_all;
        if (!head->n_kv_heads[i] && r->n_heads_all && !r->n_kv_heads_all && !head->n_kv_heads[0])
            head->n_kv_heads[i] =
                r->n_heads_all; /* the key is left out where all heads have their own */
        has_attention = has_attention || head->n_kv_heads[i];
        if (!head->k_dim && head->n_heads[i])
            head->k_dim = head->n_embd / head->n_heads[i];
    }
    if (!has_attention)
        return tool_error(
            "%s: architecture '%s' has no '%s.attention.head_count': nothing to compress", r->path,
            head->arch, head->arch);
    if (!head->v_dim)
        head->v_dim = head->k_dim;
    if (!*head->name) {
        const char *slash = strrchr(r->path, '/');
        snprintf(head->name, sizeof(head->name), "%s", slash ? slash + 1 : r->path);
    }
    return TOOL_OK;
}

int gguf_head_read(const char *path, gguf_head *out)
{
    struct stat info;
    *out = (gguf_head){0};
    if (stat(path, &info) != 0)
        return tool_error("model %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode))
        return tool_error("model %s is not a file", path);
    reader r = {
        .path = path, .left = (uint64_t)info.st_size, .head = out, .file = fopen(path, "rb")};
    if (!r.file)
        return tool_error("model %s: %s", path, strerror(errno));
    out->file_bytes = (uint64_t)info.st_size;
    int rc = read_keys(&r);
    fclose(r.file);
    if (rc == TOOL_OK)
        rc = complete(&r);
    return rc;
}
