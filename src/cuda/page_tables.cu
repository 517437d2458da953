/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which pages have copies in the younger tiers: the tables of a step, from what an engine knows of its sequences.
 * Two kernels. The first has a block of threads for each younger tier, which gives copies to new pages one after
 * another, and one for what needs no decision; the second reads, a thread for a page of a sequence.
 */
#include "cuda/launch.h"

#include <cuda_runtime.h>

namespace
{

constexpr uint32_t THREADS = 1024, READERS = 256, PAGE_TOKENS = TQKV_CUDA_TILE_TOKENS;
constexpr uint64_t LATER = 1ull << 40; /* steps; more than there will be */
constexpr uint64_t COPIES_MAX = TQKVC_COPIES_MAX;

using args_t = tqkv_cuda_page_tables_args;

/* The tables of one younger tier. */
struct tier_tables {
    int64_t *copy_of, *page_of, *used;

    __device__ tier_tables(const args_t &a, uint32_t tier)
        : copy_of(a.copy_of + (size_t)tier * (a.n_pages + 1)),
          page_of(a.page_of + (size_t)tier * (a.n_copies + 1)),
          used(a.used + (size_t)tier * (a.n_copies + 1))
    {
    }

    /* The valid copy of a page, or n_copies. */
    __device__ int64_t valid_copy(int64_t page, uint32_t n_copies) const
    {
        const int64_t copy = copy_of[page];
        return page_of[copy] == page ? copy : n_copies;
    }
};

struct token {
    int64_t page, cell; /* page -1: padding */
    int32_t position, first, next_query;
};

/* Token i of a step. */
__device__ token token_at(const args_t &a, uint32_t i)
{
    uint32_t low = 0, high = a.n_seqs - 1; /* the first sequence that ends behind i */
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if ((uint32_t)a.query_start[middle + 1] > i)
            high = middle;
        else
            low = middle + 1;
    }
    const int32_t start = a.query_start[low], length = a.seq_lens[low];
    const int64_t slot = a.slots[i];
    token t;

    t.first = length - (a.query_start[low + 1] - start);
    t.position = (int32_t)i - start + t.first;
    /* The next query is at the end, or among the newest tokens where drafts are rejected. */
    t.next_query = max(t.first, length - TQKV_CUDA_Q_MAX);
    t.page = slot >= 0 ? slot / PAGE_TOKENS : -1;
    t.cell = slot >= 0 ? slot % PAGE_TOKENS : 0;
    return t;
}

__device__ bool is_sink(const args_t &a, uint32_t tier, const token &t)
{
    return tier == 0 && t.position < (int32_t)(a.n_sink_pages * PAGE_TOKENS);
}

/* What the first new token of a page decides: whether its copy stays, goes, or is taken. */
enum fate { NOTHING, KEEPS, GIVES_UP, TAKES };

__device__ fate fate_of(const args_t &a, const tier_tables &tables, uint32_t tier, const token &t)
{
    if (t.page < 0 || (t.cell > 0 && t.position != t.first))
        return NOTHING;
    const bool is_wanted = t.next_query / (int32_t)PAGE_TOKENS - t.position / (int32_t)PAGE_TOKENS <= a.reach[tier] ||
                           is_sink(a, tier, t);
    if ((is_wanted || t.cell > 0) && tables.valid_copy(t.page, a.n_copies) < a.n_copies)
        return KEEPS;
    return is_wanted && t.cell == 0 ? TAKES : GIVES_UP;
}

/* The least of all threads' values, for all of them. */
__device__ uint64_t block_min(uint64_t value)
{
    __shared__ uint64_t of_warps[THREADS / 32];

    for (int step = 16; step > 0; step /= 2)
        value = min(value, __shfl_xor_sync(~0u, value, step));
    if (threadIdx.x % 32 == 0)
        of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warps[threadIdx.x % 32];
    for (int step = 16; step > 0; step /= 2)
        value = min(value, __shfl_xor_sync(~0u, value, step));
    __syncthreads();
    return value;
}

/*
 * The copy that is let go of next: the least recently used that this step has not used, those of the last step after
 * the others, and within each those of sinks last. n_copies: there is none.
 */
__device__ uint32_t oldest_copy(const args_t &a, const tier_tables &tables, uint32_t tier, int64_t now)
{
    uint64_t least = ~0ull;

    for (uint32_t copy = threadIdx.x; copy < a.n_copies; copy += THREADS) {
        const int64_t used = tables.used[copy];
        if (used < now) {
            const uint64_t order = (uint64_t)used + (used >= now - 1 ? 2 * LATER : 0) +
                                   (tier == 0 && a.is_sink[copy] ? LATER : 0);
            least = min(least, order * COPIES_MAX + copy);
        }
    }
    least = block_min(least);
    return least == ~0ull ? a.n_copies : (uint32_t)(least % COPIES_MAX);
}

/* Which of THREADS tokens take a copy, in their order; returns how many. */
__device__ uint32_t list_takers(bool takes, uint32_t *takers)
{
    __shared__ uint32_t of_warps[THREADS / 32];
    const uint32_t votes = __ballot_sync(~0u, takes), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t before = 0, all = 0;

    if (lane == 0)
        of_warps[warp] = __popc(votes);
    __syncthreads();
    for (uint32_t i = 0; i < THREADS / 32; i++) {
        before += i < warp ? of_warps[i] : 0;
        all += of_warps[i];
    }
    if (takes)
        takers[before + __popc(votes & ((1u << lane) - 1))] = threadIdx.x;
    __syncthreads();
    return all;
}

__device__ void take_copies(const args_t &a, const tier_tables &tables, uint32_t tier, int64_t now)
{
    __shared__ uint32_t takers[THREADS];

    for (uint32_t start = 0; start < a.n_tokens; start += THREADS) {
        const uint32_t i = start + threadIdx.x;
        const token t = token_at(a, min(i, a.n_tokens - 1));
        const fate what = i < a.n_tokens ? fate_of(a, tables, tier, t) : NOTHING;
        const uint32_t n = list_takers(what == TAKES, takers);

        if (what == GIVES_UP)
            tables.copy_of[t.page] = a.n_copies;
        for (uint32_t taker = 0; taker < n; taker++) {
            const uint32_t copy = oldest_copy(a, tables, tier, now);
            if (threadIdx.x == takers[taker]) {
                tables.copy_of[t.page] = copy;
                if (copy < a.n_copies) {
                    tables.page_of[copy] = t.page;
                    tables.used[copy] = now;
                    if (tier == 0)
                        a.is_sink[copy] = is_sink(a, tier, t);
                }
            }
            __syncthreads();
        }
    }
}

/* Pages of the copies of the youngest tier, -1 where one is not valid. */
__device__ void list_youngest(const args_t &a, const tier_tables &tables)
{
    for (uint32_t copy = threadIdx.x; copy < a.n_copies; copy += THREADS) {
        const int64_t page = tables.page_of[copy];
        a.youngest[copy] = page >= 0 && tables.copy_of[page] == copy ? page : -1;
    }
}

__device__ void write_tier(const args_t &a, uint32_t tier)
{
    const tier_tables tables(a, tier);
    const int64_t now = a.clock[0] + 1;
    int64_t *slots = a.tier_slots + (size_t)tier * a.slots_stride;

    for (uint32_t i = threadIdx.x; i < a.n_tokens; i += THREADS) {
        const token t = token_at(a, i);
        if (fate_of(a, tables, tier, t) == KEEPS) {
            const int64_t copy = tables.copy_of[t.page];
            tables.used[copy] = now;
            if (tier == 0 && t.cell == 0) /* the page may have been another sequence's before */
                a.is_sink[copy] = is_sink(a, tier, t);
        }
    }
    __syncthreads();
    take_copies(a, tables, tier, now);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.n_tokens; i += THREADS) {
        const token t = token_at(a, i);
        const int64_t copy = t.page < 0 ? a.n_copies : tables.valid_copy(t.page, a.n_copies);
        slots[i] = copy < a.n_copies ? copy * PAGE_TOKENS + t.cell : -1;
    }
    if (tier == 0)
        list_youngest(a, tables);
}

/* What the blocks of the last tier are told, and the clock for the second kernel. */
__device__ void write_blocks(const args_t &a)
{
    int64_t *slots = a.tier_slots + (size_t)a.n_young * a.slots_stride;

    for (uint32_t i = threadIdx.x; i < a.n_tokens; i += THREADS) {
        a.positions[i] = max(token_at(a, i).position, 0);
        slots[i] = a.slots[i];
    }
    for (uint32_t seq = threadIdx.x; seq < a.max_seqs; seq += THREADS)
        a.lengths[seq] = seq < a.n_seqs ? a.seq_lens[seq] : 0;
    if (threadIdx.x == 0)
        a.clock[1] = a.clock[0] + 1;
}

__global__ void __launch_bounds__(THREADS) write_kernel(const args_t a)
{
    if (blockIdx.x < a.n_young)
        write_tier(a, blockIdx.x);
    else
        write_blocks(a);
}

/* Where the page at `index` of a sequence is read; its copies of all tiers that reach it count as used. */
__device__ void read_page(const args_t &a, uint32_t seq, uint32_t index, int64_t now)
{
    const int32_t length = a.seq_lens[seq],
                  first = length - (a.query_start[seq + 1] - a.query_start[seq]);
    const int32_t page = a.block_table[(size_t)seq * a.table_stride + index];
    uint32_t from = a.n_young;
    int64_t place = page;

    for (uint32_t tier = a.n_young; tier-- > 0;) {
        const tier_tables tables(a, tier);
        const bool reaches = first / (int32_t)PAGE_TOKENS - (int32_t)index <= a.reach[tier] ||
                             (tier == 0 && index < a.n_sink_pages);
        if (!reaches || (int64_t)index * PAGE_TOKENS >= length)
            continue;
        const int64_t copy = tables.valid_copy(page, a.n_copies);
        if (copy < a.n_copies) {
            tables.used[copy] = now;
            from = tier;
            place = copy;
        }
    }
    a.places[(size_t)seq * a.places_stride + index] = (int32_t)place;
    a.tiers[(size_t)seq * a.places_stride + index] = (uint8_t)from;
}

/* Rows of the grid: sequences, and one that ends the slots of all tiers. */
__global__ void __launch_bounds__(READERS) read_kernel(const args_t a)
{
    const uint32_t i = blockIdx.x * READERS + threadIdx.x;

    if (blockIdx.y < a.n_seqs) {
        const int64_t now = a.clock[1];
        if (i < a.n_width)
            read_page(a, blockIdx.y, i, now);
        return;
    }
    for (uint32_t tier = 0; tier <= a.n_young; tier++)
        for (uint32_t k = a.n_tokens + i; k < a.max_tokens; k += gridDim.x * READERS)
            a.tier_slots[(size_t)tier * a.slots_stride + k] = -1;
    if (i == 0)
        a.clock[0] = a.clock[1];
}

} // namespace

extern "C" tqkv_status tqkvc_launch_page_tables(const tqkv_cuda_page_tables_args *args, void *stream)
{
    const dim3 readers((args->n_width + READERS - 1) / READERS, args->n_seqs + 1);

    write_kernel<<<args->n_young + 1, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    read_kernel<<<readers, READERS, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
