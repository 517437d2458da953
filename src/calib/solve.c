/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From losses to a plan. Young tiers get their mean widths first, layers that read everything and
 * layers of sliding windows each their own; their bytes at the profile's context, and everything
 * else that is not a code, come off the budget; the rest buys width for the tokens of the last tier.
 */
#include <stdbool.h>
#include <string.h>

#include "base/log.h"
#include "calib/allocate.h"
#include "calib/calibration.h"
#include "calib/fit.h"

enum {
    WIDTH_MAX = 8,
    /* A sliding-window layer reads nothing older than its window. A host that steps back by a few
     * tokens finds them in the tiers; what is older still is forgotten (no codes: its mean). */
    STEP_BACK = 32,
    /* As the store keeps them (tests/unit/test_calib.c compares with tqkv_store_bytes_at). */
    STORE_BYTES = 1024, /* what does not grow */
    SINK_TABLE = 64,    /* slots of the table; one block of 16 is used */
    SLOT_BYTES = 12
};

/*
 * Young tiers may take this share of the budget; a short context or a model whose layers mostly slide has
 * little else. Then they are narrowed, those of windows first, which a model minds least, and
 * shortened where no window asks for their length; never the newest tokens, of which an error costs
 * most. Where they take little, the last of them is drawn out; where it is too wide for that, it gives a bit and
 * gets what length that leaves (docs/QUALITY.md, "What was tried").
 */
static const double YOUNG_SHARE = 0.55;
static const double YOUNG_SHARE_LONG = 0.4; /* they may have this after a tier was doubled */
static const float YOUNG_STEP = 0.5F;       /* bits */
static const float LONG_STEP = 1.0F;        /* bits that a tier gives for more length */
static const double LONG_LEAST = 0.5;       /* and how many it then has at least over the mean of all tokens */
static const uint32_t TIER_LEAST = 32;      /* tokens */

/* Layers whose young tiers have widths of their own. */
enum { READS_ALL, SLIDES, N_KINDS };
static const float NARROW_MOST[N_KINDS] = {[READS_ALL] = 1.0F, [SLIDES] = 2.0F}; /* bits */

/* A unit run that shares one Hadamard band, and where its width goes. */
typedef struct solve_band {
    uint32_t layer, side, head, unit, n_units;
} solve_band;

typedef struct solver {
    tqkv_calib *calib;
    const tqkv_profile *profile;
    uint32_t tier_tokens[TQKV_TIERS_MAX];     /* the profile's, or what the budget asks for; */
    float tier_bits[N_KINDS][TQKV_TIERS_MAX]; /* so too */
    tqkv_plan *plan;
    solve_band *where;
    tqkvi_band *bands;
    size_t n_bands;
    double values; /* K and V values held at the context */
} solver;

static uint32_t dim_of(const tqkv_plan_layer *shape, uint32_t side)
{
    return side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim;
}

static uint32_t round_16(uint32_t n)
{
    return (n + TQKVI_BLOCK_TOKENS - 1) / TQKVI_BLOCK_TOKENS * TQKVI_BLOCK_TOKENS;
}

static uint32_t resident(const solver *s, uint32_t layer)
{
    const uint32_t held = s->calib->layers[layer].resident;

    return held && held < s->profile->context ? held : s->profile->context;
}

static uint32_t n_young(const solver *s, uint32_t layer)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i + 1 < s->plan->n_tiers; i++)
        n += s->plan->layers[layer].shape.tier_tokens[i];
    return n;
}

/* What a sliding window may read, rounded up; 0: everything. */
static uint32_t reach(const solver *s, uint32_t layer)
{
    const uint32_t window = s->plan->layers[layer].shape.window;

    return window ? round_16(window) + STEP_BACK : 0;
}

/* Whether anything in the last tier of a layer is ever read. */
static bool has_old(const solver *s, uint32_t layer)
{
    return !reach(s, layer) || n_young(s, layer) < reach(s, layer);
}

/* Tokens of the last tier that cost memory at the context, in whole blocks. */
static uint32_t n_old(const solver *s, uint32_t layer)
{
    const uint32_t young = n_young(s, layer);

    if (reach(s, layer)) /* cells are used again in turn: every one of them has been old once */
        return resident(s, layer);
    return resident(s, layer) > young ? round_16(resident(s, layer) - young) : 0;
}

/*
 * Tier lengths of a layer: the profile's. In a sliding window they end a little after it; where they
 * end before it, the last of them is drawn out over the rest of the window, if that takes no more
 * bytes than coding every cell of the last tier would.
 */
static void set_tiers(const solver *s, uint32_t layer)
{
    tqkv_plan_layer *shape = &s->plan->layers[layer].shape;
    const uint32_t n_tiers = s->plan->n_tiers;
    const uint32_t *tokens = reach(s, layer) ? s->profile->tier_tokens : s->tier_tokens;
    uint32_t left = reach(s, layer) ? reach(s, layer) : UINT32_MAX;

    for (uint32_t i = 0; i + 1 < n_tiers; i++) {
        shape->tier_tokens[i] = tokens[i] < left ? tokens[i] : left;
        left -= shape->tier_tokens[i];
    }
    if (reach(s, layer) && n_tiers > 1 && left > 0 &&
        (double)left * (double)s->profile->tier_bits[n_tiers - 2] <=
            ((double)resident(s, layer) - (double)n_young(s, layer)) * s->profile->bits_total)
        shape->tier_tokens[n_tiers - 2] += left;
}

static tqkv_status make_bands(solver *s)
{
    size_t n = 0;

    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        for (uint32_t side = 0; side < 2; side++)
            n += tqkvi_calib_units(s->calib, l, (tqkv_side)side);
    s->where = tqkvi_alloc(&s->calib->mem, n * sizeof(*s->where));
    s->bands = tqkvi_alloc(&s->calib->mem, n * sizeof(*s->bands));
    if (!s->where || !s->bands)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        for (uint32_t side = 0; side < 2; side++) {
            const tqkv_plan_layer *shape = &s->plan->layers[l].shape;
            const uint32_t per_head = dim_of(shape, side) / TQKV_UNIT_CHANNELS;
            const uint32_t merge = tqkvi_fit_band(dim_of(shape, side)) / TQKV_UNIT_CHANNELS;

            for (uint32_t u = 0; u < shape->n_kv_heads * per_head; u += merge)
                s->where[s->n_bands++] = (solve_band){l, side, u / per_head, u % per_head, merge};
            s->values += (double)resident(s, l) * (double)(shape->n_kv_heads * dim_of(shape, side));
        }
    return TQKV_OK;
}

/* Writes the widths of the bands into the layouts of a tier. */
static tqkv_status set_layouts(const solver *s, uint32_t tier)
{
    for (size_t b = 0; b < s->n_bands; b++) {
        const solve_band *w = &s->where[b];
        tqkvi_layout *layout = &s->plan->layers[w->layer].heads[w->side][w->head].layout[tier];

        memset(layout->bits + w->unit, s->bands[b].bits, w->n_units);
        layout->n_units = dim_of(&s->plan->layers[w->layer].shape, w->side) / TQKV_UNIT_CHANNELS;
        if (w->unit + w->n_units == layout->n_units) {
            uint8_t bits[TQKV_UNITS_MAX];

            memcpy(bits, layout->bits, layout->n_units);
            TQKV_TRY(tqkvi_layout_init(layout, bits, layout->n_units));
        }
    }
    return TQKV_OK;
}

static double band_loss(const solver *s, const solve_band *w)
{
    const uint32_t per_head = dim_of(&s->plan->layers[w->layer].shape, w->side) / TQKV_UNIT_CHANNELS;
    double loss = 0.0;

    for (uint32_t u = 0; u < w->n_units; u++)
        loss += tqkvi_calib_loss(s->calib, w->layer, (tqkv_side)w->side, w->head * per_head + w->unit + u);
    return loss;
}

static int kind_of(const solver *s, uint32_t layer)
{
    return s->plan->layers[layer].shape.window ? SLIDES : READS_ALL;
}

/* Young tier: mean width over all values of a kind of layer, by loss. */
static tqkv_status solve_young(solver *s, uint32_t tier)
{
    memset(s->bands, 0, s->n_bands * sizeof(*s->bands));
    for (int kind = 0; kind < N_KINDS; kind++) {
        double channels = 0.0;

        for (size_t b = 0; b < s->n_bands; b++) {
            const bool is_meant = kind_of(s, s->where[b].layer) == kind;

            s->bands[b].loss = is_meant ? band_loss(s, &s->where[b]) : 0.0; /* without loss it keeps its width */
            s->bands[b].price = (double)s->where[b].n_units;
            channels += is_meant ? s->bands[b].price : 0.0;
        }
        tqkvi_allocate(s->bands, s->n_bands, WIDTH_MAX, channels * (double)s->tier_bits[kind][tier] + 1e-6);
    }
    return set_layouts(s, tier);
}

static uint32_t tier_token_bytes(const solver *s, uint32_t layer, uint32_t tier)
{
    uint32_t bytes = 0;

    for (uint32_t side = 0; side < 2; side++)
        for (uint32_t g = 0; g < s->plan->layers[layer].shape.n_kv_heads; g++)
            bytes += s->plan->layers[layer].heads[side][g].layout[tier].row_bytes + 1;
    return bytes;
}

/*
 * Slots that a young tier fills. Tokens come and go 16 at a time, but come one by one to the first
 * tier; and a sliding window overwrites tokens that are still in its last one.
 */
static uint32_t n_slots(const solver *s, uint32_t layer, uint32_t tier)
{
    const tqkv_plan_layer *shape = &s->plan->layers[layer].shape;
    const bool one_by_one = tier == 0 || (shape->window && tier + 2 == s->plan->n_tiers);

    return round_16(shape->tier_tokens[tier] + (one_by_one ? TQKVI_BLOCK_TOKENS - 1 : 0));
}

/* Everything a layer holds at the context but the codes of its last tier. */
static double fixed_bytes(const solver *s, uint32_t layer)
{
    const tqkv_plan_layer *shape = &s->plan->layers[layer].shape;
    const double cells = (double)resident(s, layer);
    double bytes = STORE_BYTES + cells / TQKVI_BLOCK_TOKENS * sizeof(int32_t) + 2.0 * cells / 8.0;

    bytes += (double)n_old(s, layer) * 2.0 * (double)shape->n_kv_heads; /* scales */
    for (uint32_t i = 0; i + 1 < s->plan->n_tiers; i++)
        bytes += (double)(n_slots(s, layer, i) * (tier_token_bytes(s, layer, i) + SLOT_BYTES));
    if (s->plan->n_tiers > 1)
        bytes += (double)(TQKVI_BLOCK_TOKENS * tier_token_bytes(s, layer, 0) + SINK_TABLE * SLOT_BYTES);
    return bytes;
}

static double all_fixed_bytes(const solver *s)
{
    double bytes = 0.0;

    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        if (s->plan->layers[l].shape.n_kv_heads)
            bytes += fixed_bytes(s, l);
    return bytes;
}

static bool has_kind(const solver *s, int kind)
{
    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        if (s->plan->layers[l].shape.n_kv_heads && kind_of(s, l) == kind)
            return true;
    return false;
}

/* Takes half a bit from the oldest young tier that may be narrower. False: none may. */
static bool narrow_young(solver *s)
{
    for (int kind = N_KINDS; kind-- > 0;) {
        if (!has_kind(s, kind))
            continue;
        for (uint32_t i = s->plan->n_tiers - 1; i-- > 1;)
            if (s->tier_bits[kind][i] - YOUNG_STEP >= s->profile->tier_bits[i] - NARROW_MOST[kind]) {
                s->tier_bits[kind][i] -= YOUNG_STEP;
                return true;
            }
    }
    return false;
}

/* Takes a quarter from all young tiers but the first. False: they are short already. */
static bool shorten_young(solver *s)
{
    bool any = false;

    for (uint32_t i = 1; i + 1 < s->plan->n_tiers; i++) {
        const uint32_t shorter = s->tier_tokens[i] * 3 / 4 / TQKVI_BLOCK_TOKENS * TQKVI_BLOCK_TOKENS;

        if (shorter >= TIER_LEAST) {
            s->tier_tokens[i] = shorter;
            any = true;
        }
    }
    return any;
}

/* Lengths and widths of the young tiers as they are asked for, and what share of the budget they take. */
static tqkv_status try_young(solver *s, double *share)
{
    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        if (s->plan->layers[l].shape.n_kv_heads)
            set_tiers(s, l);
    for (uint32_t tier = 0; tier + 1 < s->plan->n_tiers; tier++)
        TQKV_TRY(solve_young(s, tier));
    *share = all_fixed_bytes(s) / (s->profile->bits_total / 8.0 * s->values);
    return TQKV_OK;
}

/*
 * Gives the last young tier that many tokens, and that many bits in layers that read all, if young tiers then take
 * at most `most` of the budget; otherwise, and where it would be too long or too narrow, nothing changes.
 */
static tqkv_status try_longer(solver *s, uint32_t n_tokens, float bits, double most, bool *longer)
{
    const uint32_t last = s->plan->n_tiers - 2;
    const uint32_t n_before = s->tier_tokens[last];
    const float bits_before = s->tier_bits[READS_ALL][last];
    double share;

    *longer = false;
    if (last == 0 || !has_kind(s, READS_ALL) || n_tokens > s->profile->context ||
        bits < s->profile->tier_bits[last] - NARROW_MOST[READS_ALL])
        return TQKV_OK;
    s->tier_tokens[last] = n_tokens;
    s->tier_bits[READS_ALL][last] = bits;
    TQKV_TRY(try_young(s, &share));
    *longer = share <= most;
    if (*longer)
        return TQKV_OK;
    s->tier_tokens[last] = n_before;
    s->tier_bits[READS_ALL][last] = bits_before;
    return try_young(s, &share);
}

/* Twice the length as often as it fits; where it never does, at fewer bits, and then as long as fits. */
static tqkv_status draw_out(solver *s)
{
    const uint32_t last = s->plan->n_tiers - 2, n_first = s->tier_tokens[last];
    const uint32_t step = n_first / 4 / TQKVI_BLOCK_TOKENS * TQKVI_BLOCK_TOKENS;
    const float bits = s->tier_bits[READS_ALL][last];
    bool longer;

    do
        TQKV_TRY(try_longer(s, 2 * s->tier_tokens[last], bits, YOUNG_SHARE_LONG, &longer));
    while (longer);
    if (s->tier_tokens[last] > n_first || (double)(bits - LONG_STEP) <= s->profile->bits_total + LONG_LEAST)
        return TQKV_OK;
    TQKV_TRY(try_longer(s, 2 * n_first, bits - LONG_STEP, YOUNG_SHARE, &longer));
    while (longer && step > 0)
        TQKV_TRY(try_longer(s, s->tier_tokens[last] + step, bits - LONG_STEP, YOUNG_SHARE, &longer));
    return TQKV_OK;
}

static tqkv_status solve_all_young(solver *s)
{
    double share;

    memcpy(s->tier_tokens, s->profile->tier_tokens, sizeof(s->tier_tokens));
    for (int kind = 0; kind < N_KINDS; kind++)
        memcpy(s->tier_bits[kind], s->profile->tier_bits, sizeof(s->tier_bits[kind]));
    TQKV_TRY(try_young(s, &share));
    while (share > YOUNG_SHARE && (narrow_young(s) || shorten_young(s)))
        TQKV_TRY(try_young(s, &share));
    return s->plan->n_tiers < 2 ? TQKV_OK : draw_out(s);
}

static tqkv_status solve_old(solver *s)
{
    const uint32_t tier = s->plan->n_tiers - 1;
    const double budget = s->profile->bits_total / 8.0 * s->values, fixed = all_fixed_bytes(s);
    double spent;

    for (size_t b = 0; b < s->n_bands; b++) {
        const solve_band *w = &s->where[b];

        s->bands[b] = (tqkvi_band){.price = (double)n_old(s, w->layer) * 2.0 * (double)w->n_units};
        if (has_old(s, w->layer))
            s->bands[b].loss = band_loss(s, w);
    }
    if (fixed >= budget) {
        tqkvi_log(&s->calib->log, TQKV_LOG_ERROR,
                  "bits: %.2f per value cannot be had at %u tokens, the young tiers alone take %.2f: ask for more bits or "
                  "a longer context",
                  s->profile->bits_total, s->profile->context, fixed * 8.0 / s->values);
        return TQKV_ERR_INVALID_ARG;
    }
    spent = tqkvi_allocate(s->bands, s->n_bands, WIDTH_MAX, budget - fixed);
    s->plan->bits_total = (fixed + spent) * 8.0 / s->values;
    return set_layouts(s, tier);
}

/* Copies means, transforms and weights of the draft. */
static tqkv_status copy_heads(const solver *s)
{
    for (uint32_t l = 0; l < s->plan->n_layers; l++)
        for (uint32_t side = 0; side < 2; side++)
            for (uint32_t g = 0; g < s->plan->layers[l].shape.n_kv_heads; g++) {
                const tqkvi_head_plan *from = &s->calib->draft->layers[l].heads[side][g];
                tqkvi_head_plan *to = &s->plan->layers[l].heads[side][g];
                const size_t d = dim_of(&s->plan->layers[l].shape, side);

                memcpy(to->mean, from->mean, d * sizeof(*to->mean));
                memcpy(to->transform, from->transform, d * d * sizeof(*to->transform));
                memcpy(to->weight, from->weight, d / TQKV_UNIT_CHANNELS * sizeof(*to->weight));
            }
    return TQKV_OK;
}

static tqkv_status solve(solver *s)
{
    tqkv_plan_layer *shapes = tqkvi_alloc(&s->calib->mem, s->calib->n_layers * sizeof(*shapes));
    tqkv_status status;

    if (!shapes)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t l = 0; l < s->calib->n_layers; l++)
        shapes[l] = s->calib->layers[l].shape;
    status = tqkvi_plan_create(&s->calib->mem, shapes, s->calib->n_layers, &s->plan);
    tqkvi_free(&s->calib->mem, shapes);
    TQKV_TRY(status);
    s->plan->n_tiers = s->profile->n_tiers;
    s->plan->n_sinks = s->calib->n_sinks;
    s->plan->frame_tokens = s->calib->frame_tokens;
    s->plan->context = s->profile->context;
    TQKV_TRY(tqkvi_plan_set_names(s->plan, s->calib->model, s->calib->arch, s->profile->name));
    TQKV_TRY(copy_heads(s));
    TQKV_TRY(make_bands(s));
    TQKV_TRY(solve_all_young(s));
    TQKV_TRY(solve_old(s));
    return tqkvi_plan_seal(s->plan, &s->calib->log);
}

tqkv_status tqkvi_calib_solve(tqkv_calib *calib, const tqkv_profile *profile, tqkv_plan **out)
{
    solver s = {.calib = calib, .profile = profile};
    const tqkv_status status = solve(&s);

    tqkvi_free(&calib->mem, s.where);
    tqkvi_free(&calib->mem, s.bands);
    if (status != TQKV_OK)
        tqkv_plan_destroy(s.plan);
    *out = status == TQKV_OK ? s.plan : NULL;
    return status;
}
