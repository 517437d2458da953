/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bytes of a file to a plan. Nothing is believed: every field is checked before it is used,
 * and memory is asked for only after the file has shown that it is long enough to fill it.
 *
 * Only the file that plan_write.c would write is accepted, so reading and saving a plan gives the
 * same bytes and the same fingerprint.
 */
#include <string.h>

#include "base/half.h"
#include "base/log.h"
#include "format/plan_file.h"

#define REMEDY "the file is damaged or was not written by tqkv: copy it again or calibrate again"
#define LAYOUT_BYTES_MIN 3 /* n_units and one width */
#define ROPE_BYTES_MIN 8
#define LAYER_BYTES_MIN 4

typedef struct reader {
    const uint8_t *bytes;
    size_t n_bytes, at;
    const tqkv_logger *log;
    const tqkv_allocator *mem;

    tqkv_rope *ropes; /* catalogues, and whether somebody has used an entry */
    float *inv_freq;
    uint8_t *rope_used;
    tqkvi_layout *layouts;
    uint8_t *layout_used;
    uint32_t n_ropes, n_layouts;
    tqkv_plan_layer *shapes;
} reader;

static tqkv_status fault(const reader *r, size_t at, const char *where, const char *why)
{
    tqkvi_log(r->log, TQKV_LOG_ERROR, "plan: %s at byte %zu: %s; " REMEDY, where, at, why);
    return TQKV_ERR_CORRUPT;
}

static size_t left(const reader *r)
{
    return r->n_bytes - r->at;
}

/* The next n bytes, NULL (and a text) when the file is shorter. */
static const uint8_t *take(reader *r, size_t n, const char *where)
{
    if (left(r) < n) {
        (void)fault(r, r->at, where, "the file ends inside");
        return NULL;
    }
    const uint8_t *p = r->bytes + r->at;
    r->at += n;
    return p;
}

static tqkv_status take_u32(reader *r, const char *where, uint32_t *out)
{
    const uint8_t *p = take(r, 4, where);
    *out = p ? tqkvi_load_u32(p) : 0;
    return p ? TQKV_OK : TQKV_ERR_CORRUPT;
}

static tqkv_status take_floats(reader *r, const char *where, float *out, size_t n)
{
    const uint8_t *p = take(r, n * 4, where);
    if (!p)
        return TQKV_ERR_CORRUPT;
    for (size_t i = 0; i < n; i++)
        out[i] = tqkvi_float_of_bits(tqkvi_load_u32(p + 4 * i));
    return TQKV_OK;
}

tqkv_status tqkvi_plan_check_start(const uint8_t *bytes, size_t n_bytes, uint64_t n_file,
                                   const tqkv_logger *log)
{
    const size_t n_magic = n_bytes < TQKVI_PLAN_MAGIC_BYTES ? n_bytes : TQKVI_PLAN_MAGIC_BYTES;
    if (n_bytes == 0 || memcmp(bytes, TQKVI_PLAN_MAGIC, n_magic) != 0) {
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: magic at byte 0: this is not a .tqkv plan");
        return TQKV_ERR_CORRUPT;
    }
    if (n_bytes < TQKVI_PLAN_FINGERPRINT_AT) {
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: header at byte 0: the file ends inside; " REMEDY);
        return TQKV_ERR_CORRUPT;
    }
    const uint32_t version = tqkvi_load_u32(bytes + TQKVI_PLAN_VERSION_AT);
    if (version != TQKVI_PLAN_VERSION) {
        tqkvi_log(log, TQKV_LOG_ERROR,
                  "plan: version at byte %d: %u, and this build reads %u; calibrate again with "
                  "this build or "
                  "use the build that wrote the plan",
                  TQKVI_PLAN_VERSION_AT, version, TQKVI_PLAN_VERSION);
        return TQKV_ERR_VERSION;
    }
    const uint64_t length = tqkvi_load_u64(bytes + TQKVI_PLAN_LENGTH_AT);
    if (length != n_file || length < TQKVI_PLAN_HEADER_BYTES) {
        tqkvi_log(log, TQKV_LOG_ERROR,
                  "plan: length at byte %d: %llu, but there are %llu bytes; " REMEDY,
                  TQKVI_PLAN_LENGTH_AT, (unsigned long long)length, (unsigned long long)n_file);
        return TQKV_ERR_CORRUPT;
    }
    return TQKV_OK;
}

/* numbers: filled from the header. */
static tqkv_status read_header(reader *r, tqkv_plan *numbers)
{
    uint8_t fingerprint[TQKV_FINGERPRINT_BYTES];
    TQKV_TRY(tqkvi_plan_check_start(r->bytes, r->n_bytes, r->n_bytes, r->log));
    tqkvi_plan_fingerprint(r->bytes, r->n_bytes, fingerprint);
    if (memcmp(fingerprint, r->bytes + TQKVI_PLAN_FINGERPRINT_AT, sizeof(fingerprint)) != 0)
        return fault(r, TQKVI_PLAN_FINGERPRINT_AT, "fingerprint",
                     "the bytes are not those that were written");
    memcpy(numbers->fingerprint, fingerprint, sizeof(fingerprint));

    const uint8_t *p = r->bytes;
    numbers->n_layers = tqkvi_load_u32(p + 56);
    numbers->n_tiers = tqkvi_load_u32(p + 60);
    numbers->n_sinks = tqkvi_load_u32(p + 64);
    numbers->frame_tokens = tqkvi_load_u32(p + 68);
    numbers->context = tqkvi_load_u32(p + 72);
    r->n_ropes = tqkvi_load_u32(p + 76);
    r->n_layouts = tqkvi_load_u32(p + 80);
    const uint64_t bits_total = tqkvi_load_u64(p + 88);
    memcpy(&numbers->bits_total, &bits_total, sizeof(bits_total));
    r->at = TQKVI_PLAN_HEADER_BYTES;

    if (tqkvi_load_u32(p + 12) != 0)
        return fault(r, 12, "header", "reserved bytes are not 0");
    if (tqkvi_load_u32(p + 84) != 0)
        return fault(r, 84, "header", "reserved bytes are not 0");
    const char *why = tqkvi_numbers_fault(numbers);
    if (why)
        return fault(r, 56, "header", why);
    if (r->n_ropes > numbers->n_layers || r->n_ropes > left(r) / ROPE_BYTES_MIN)
        return fault(r, 76, "n_ropes", "more than the file can hold");
    if (r->n_layouts > left(r) / LAYOUT_BYTES_MIN)
        return fault(r, 80, "n_layouts", "more than the file can hold");
    if (numbers->n_layers > left(r) / LAYER_BYTES_MIN)
        return fault(r, 56, "n_layers", "more than the file can hold");
    return TQKV_OK;
}

/* *out: NUL-terminated copy, owned by the caller. */
static tqkv_status read_name(reader *r, const char *where, char **out)
{
    const size_t at = r->at;
    const uint8_t *p = take(r, 2, where);
    if (!p)
        return TQKV_ERR_CORRUPT;
    const size_t n = tqkvi_load_u16(p);
    p = take(r, n, where);
    if (!p)
        return TQKV_ERR_CORRUPT;
    const char *why = tqkvi_name_fault((const char *)p, n);
    if (why)
        return fault(r, at, where, why);
    *out = tqkvi_alloc_zero(r->mem, n + 1);
    if (!*out)
        return TQKV_ERR_NO_MEMORY;
    memcpy(*out, p, n);
    return TQKV_OK;
}

static tqkv_status read_ropes(reader *r)
{
    const size_t table_max = TQKVI_DIM_MAX / 2;
    const size_t n_left = left(r) / sizeof(float);
    const size_t n_floats = r->n_ropes * table_max < n_left ? r->n_ropes * table_max : n_left;
    r->ropes = tqkvi_alloc_zero(r->mem, r->n_ropes * sizeof(*r->ropes));
    r->rope_used = tqkvi_alloc_zero(r->mem, r->n_ropes);
    r->inv_freq = tqkvi_alloc(r->mem, n_floats * sizeof(float));
    if (!r->ropes || !r->rope_used || !r->inv_freq)
        return TQKV_ERR_NO_MEMORY;

    float *values = r->inv_freq;
    for (uint32_t i = 0; i < r->n_ropes; i++) {
        tqkv_rope *rope = &r->ropes[i];
        const size_t at = r->at;
        TQKV_TRY(take_u32(r, "rope style", &rope->style));
        TQKV_TRY(take_u32(r, "rope n_rot", &rope->n_rot));
        if (rope->style == TQKV_ROPE_NONE && rope->n_rot != 0)
            return fault(r, at, "rope", "n_rot must be 0 where there is no rotation");
        if (rope->n_rot > TQKVI_DIM_MAX)
            return fault(r, at, "rope", "n_rot must be at most 1024");
        TQKV_TRY(take_floats(r, "rope inv_freq", values, rope->n_rot / 2));
        rope->inv_freq = values;
        values += rope->n_rot / 2;
        const char *why = tqkvi_rope_fault(rope);
        if (why)
            return fault(r, at, "rope", why);
        if (i > 0 && tqkvi_rope_compare(&r->ropes[i - 1], rope) >= 0)
            return fault(r, at, "rope", "tables are not in ascending order");
    }
    return TQKV_OK;
}

static tqkv_status read_layouts(reader *r)
{
    r->layouts = tqkvi_alloc_zero(r->mem, r->n_layouts * sizeof(*r->layouts));
    r->layout_used = tqkvi_alloc_zero(r->mem, r->n_layouts);
    if (!r->layouts || !r->layout_used)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t i = 0; i < r->n_layouts; i++) {
        const size_t at = r->at;
        const uint8_t *p = take(r, 2, "layout");
        if (!p)
            return TQKV_ERR_CORRUPT;
        const uint32_t n_units = tqkvi_load_u16(p);
        const uint8_t *bits = take(r, n_units, "layout");
        if (!bits)
            return TQKV_ERR_CORRUPT;
        if (tqkvi_layout_init(&r->layouts[i], bits, n_units) != TQKV_OK)
            return fault(
                r, at, "layout",
                "a width or the number of units does not exist, or f16 is mixed with others");
        if (i > 0 && tqkvi_layout_compare(&r->layouts[i - 1], &r->layouts[i]) >= 0)
            return fault(r, at, "layout", "layouts are not in ascending order");
    }
    return TQKV_OK;
}

static tqkv_status read_shape(reader *r, tqkv_plan_layer *shape, uint32_t n_tiers)
{
    const size_t at = r->at;
    uint32_t rope;
    TQKV_TRY(take_u32(r, "layer n_kv_heads", &shape->n_kv_heads));
    if (shape->n_kv_heads == 0)
        return TQKV_OK;
    TQKV_TRY(take_u32(r, "layer n_heads", &shape->n_heads));
    TQKV_TRY(take_u32(r, "layer k_dim", &shape->k_dim));
    TQKV_TRY(take_u32(r, "layer v_dim", &shape->v_dim));
    shape->is_latent = (shape->v_dim & TQKVI_LATENT_BIT) != 0;
    shape->v_dim &= ~TQKVI_LATENT_BIT;
    TQKV_TRY(take_u32(r, "layer window", &shape->window));
    TQKV_TRY(take_u32(r, "layer rope", &rope));
    for (uint32_t tier = 0; tier < n_tiers; tier++)
        TQKV_TRY(take_u32(r, "layer tier_tokens", &shape->tier_tokens[tier]));
    if (rope >= r->n_ropes)
        return fault(r, at, "layer", "rope is not in the catalogue");
    shape->rope = r->ropes[rope];
    r->rope_used[rope] = 1;
    const char *why = tqkvi_shape_fault(shape);
    if (!why)
        why = tqkvi_tiers_fault(shape, n_tiers);
    return why ? fault(r, at, "layer", why) : TQKV_OK;
}

static tqkv_status read_shapes(reader *r, uint32_t n_layers, uint32_t n_tiers)
{
    r->shapes = tqkvi_alloc_zero(r->mem, n_layers * sizeof(*r->shapes));
    if (!r->shapes)
        return TQKV_ERR_NO_MEMORY;
    uint64_t n_heads = 0;
    for (uint32_t i = 0; i < n_layers; i++) {
        TQKV_TRY(read_shape(r, &r->shapes[i], n_tiers));
        n_heads += r->shapes[i].n_kv_heads;
    }
    /* The least that the heads take is their layout numbers; only then memory for them. */
    if (n_heads * 2 * n_tiers * 4 > left(r))
        return fault(r, r->at, "heads", "the file ends inside");
    return TQKV_OK;
}

static tqkv_status read_transform(reader *r, float *m, uint32_t dim)
{
    const uint8_t *exponents = take(r, dim, "transform exponents");
    const size_t at = r->at;
    const uint8_t *values = exponents ? take(r, (size_t)dim * dim * 2, "transform") : NULL;
    if (!values)
        return TQKV_ERR_CORRUPT;
    for (uint32_t j = 0; j < dim; j++) {
        const int e = exponents[j] < 128 ? exponents[j] : exponents[j] - 256;
        if (e < TQKVI_EXPONENT_MIN || e > TQKVI_EXPONENT_MAX)
            return fault(r, at - dim + j, "transform exponent", "outside of -100..112");
        const float scale = tqkvi_power_of_two(e);
        float column[TQKVI_DIM_MAX];
        for (uint32_t i = 0; i < dim; i++) {
            const size_t k = (size_t)i * dim + j;
            const uint16_t half = tqkvi_load_u16(values + 2 * k);
            if ((half & 0x7c00) == 0x7c00)
                return fault(r, at + 2 * k, "transform", "a NaN or an infinity");
            column[i] = tqkvi_half_to_float(half) * scale;
            m[k] = column[i];
        }
        if (tqkvi_column_exponent(column, dim) != e)
            return fault(r, at - dim + j, "transform exponent", "not the one of the largest value");
    }
    return TQKV_OK;
}

static tqkv_status read_head(reader *r, tqkv_plan *plan, uint32_t layer, tqkv_side side,
                             uint32_t head)
{
    tqkvi_head_plan *h = &plan->layers[layer].heads[side][head];
    const uint32_t dim = tqkvi_shape_dim(&plan->layers[layer].shape, side);
    const size_t at = r->at;
    for (uint32_t tier = 0; tier < plan->n_tiers; tier++) {
        uint32_t id;
        TQKV_TRY(take_u32(r, "head layout", &id));
        if (id >= r->n_layouts || r->layouts[id].n_units != dim / TQKV_UNIT_CHANNELS)
            return fault(r, at, "head layout", "not in the catalogue or of another size");
        h->layout[tier] = r->layouts[id];
        r->layout_used[id] = 1;
        if ((h->layout[tier].bits[0] == TQKVI_BITS_PLAIN) != tqkvi_head_is_plain(h))
            return fault(r, at, "head layout", "f16 must be in every tier of a head or in none");
    }
    if (tqkvi_head_is_plain(h))
        return TQKV_OK;

    const size_t n_bytes =
        (size_t)dim * 4 + dim / TQKV_UNIT_CHANNELS * 4 + dim + (size_t)dim * dim * 2;
    if (left(r) < n_bytes)
        return fault(r, at, "head", "the file ends inside");
    TQKV_TRY(tqkvi_plan_alloc_head(plan, layer, side, head));
    TQKV_TRY(take_floats(r, "mean", h->mean, dim));
    TQKV_TRY(take_floats(r, "weight", h->weight, dim / TQKV_UNIT_CHANNELS));
    TQKV_TRY(read_transform(r, h->transform, dim));
    const char *why = tqkvi_vectors_fault(h, dim);
    return why ? fault(r, at, "head", why) : TQKV_OK;
}

static tqkv_status read_heads(reader *r, tqkv_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        for (size_t side = 0; side < 2; side++) {
            for (uint32_t g = 0; g < plan->layers[i].shape.n_kv_heads; g++)
                TQKV_TRY(read_head(r, plan, i, (tqkv_side)side, g));
        }
        tqkvi_layer_set_token_bytes(&plan->layers[i], plan->n_tiers);
    }
    if (left(r) != 0)
        return fault(r, r->at, "end", "bytes follow the last head");
    for (uint32_t i = 0; i < r->n_ropes; i++) {
        if (!r->rope_used[i])
            return fault(r, r->at, "rope", "the catalogue has a table that no layer uses");
    }
    for (uint32_t i = 0; i < r->n_layouts; i++) {
        if (!r->layout_used[i])
            return fault(r, r->at, "layout", "the catalogue has a layout that no head uses");
    }
    return TQKV_OK;
}

static tqkv_status read_plan(reader *r, tqkv_plan **plan)
{
    tqkv_plan numbers = {.n_layers = 0};
    TQKV_TRY(read_header(r, &numbers));

    char *names[3] = {NULL, NULL, NULL};
    tqkv_status status = read_name(r, "model", &names[0]);
    if (status == TQKV_OK)
        status = read_name(r, "arch", &names[1]);
    if (status == TQKV_OK)
        status = read_name(r, "profile", &names[2]);
    if (status == TQKV_OK)
        status = read_ropes(r);
    if (status == TQKV_OK)
        status = read_layouts(r);
    if (status == TQKV_OK)
        status = read_shapes(r, numbers.n_layers, numbers.n_tiers);
    if (status == TQKV_OK)
        status = tqkvi_plan_create_bare(r->mem, r->shapes, numbers.n_layers, plan);
    if (status == TQKV_OK)
        status = tqkvi_plan_set_names(*plan, names[0], names[1], names[2]);
    for (size_t i = 0; i < 3; i++)
        tqkvi_free(r->mem, names[i]);
    TQKV_TRY(status);

    (*plan)->n_tiers = numbers.n_tiers;
    (*plan)->n_sinks = numbers.n_sinks;
    (*plan)->frame_tokens = numbers.frame_tokens;
    (*plan)->context = numbers.context;
    (*plan)->bits_total = numbers.bits_total;
    memcpy((*plan)->fingerprint, numbers.fingerprint, sizeof(numbers.fingerprint));
    return read_heads(r, *plan);
}

tqkv_status tqkvi_plan_parse(const tqkv_allocator *mem, const void *bytes, size_t n_bytes,
                             const tqkv_logger *log, tqkv_plan **out)
{
    tqkv_allocator own;
    tqkvi_allocator_init(&own, mem);
    reader r = {.bytes = bytes, .n_bytes = n_bytes, .log = log, .mem = &own};
    tqkv_plan *plan = NULL;

    const tqkv_status status = read_plan(&r, &plan);
    tqkvi_free(&own, r.ropes);
    tqkvi_free(&own, r.inv_freq);
    tqkvi_free(&own, r.rope_used);
    tqkvi_free(&own, r.layouts);
    tqkvi_free(&own, r.layout_used);
    tqkvi_free(&own, r.shapes);
    if (status != TQKV_OK) {
        tqkvi_plan_destroy(plan);
        plan = NULL;
    }
    if (status == TQKV_ERR_NO_MEMORY)
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: out of memory");
    *out = plan;
    return status;
}
