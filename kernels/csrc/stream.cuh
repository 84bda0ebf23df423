// The loop that all kernels share: stream weights from memory through registers into mma.
//
//              64 rows (one row block)                 a warp takes every 8th group of 128 k;
//            +----+----+----+----+                     an item is (row block, group): 8 loads of
//   k16 step | 16 | 16 | 16 | 16 |  = 512 bytes        16 bytes per lane
//            +----+----+----+----+                        ||
//   x 8      |    |    |    |    |  = one item            ||  A: unpacked in registers
//            +----+----+----+----+                        \/
//   columns (tokens) 8 x kTiles  <-- B: ldmatrix from a slice of shared memory that the warp copied
//                                       for itself: 128 k of its columns, and the item's 64 scales
//
// One item is in flight per warp: a register is loaded again as soon as it has been consumed. Two
// items were slower: the registers that they take are needed to overlap the arithmetic.
// Sums of a group stay in FP32 and are scaled there; weights are never rounded. The totals of the 8
// warps are added through shared memory in a fixed order.
#pragma once
#include <type_traits>

#include "fragment.cuh"

namespace dsv4 {

struct Tiled {
  const uint8_t* weight;
  const __nv_bfloat16* scale;
  int groups;  // k / 128
  int blocks;  // rows / 64
};

// Occupancy by column tiles: what the registers allow without spilling.
template <int kTiles>
struct Config {
  static_assert(kTiles == 1 || kTiles == 2, "column tiles per pass");
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kBlocksPerSm = kTiles == 1 ? 2 : 1;
};

template <int kTiles>
struct alignas(16) Slice {
  uint8_t rows[Config<kTiles>::kColumns * kRowBytes];
  __nv_bfloat16 scale[kBlockRows];
};

template <int kTiles>
struct alignas(16) Shared {
  Slice<kTiles> slice[kWarps][2];  // one is multiplied while the other is filled
  uint4 zeros[kGroupSize * 2 / 16];  // the row of columns without a token
};
static_assert(sizeof(Slice<1>) >= kWarpWords * sizeof(float), "a slice holds an exchange");
static_assert(sizeof(Shared<1>) <= 45 * 1024,
              "two blocks, with their static tables, fit in the 100 KB of an sm_120 multiprocessor");
static_assert(sizeof(Shared<2>) <= 99 * 1024, "sm_120 gives a block 99 KB");

// Where a warp is in its list of items: groups warp, warp + 8, ... of outer 0, then of outer 1, ...
// `outer` counts what the kernel walks through besides k.
struct Cursor {
  int outer, group;
  int index;  // of (expert, group, row block 0) in [expert][group][row block]
};

// Items of an outer that a warp has.
__device__ __forceinline__ int own_groups(int groups, int warp) {
  return (groups - warp + kWarps - 1) / kWarps;
}

// threadIdx.x where it is used once in a while: what is computed from it is not kept in registers
// through the loop.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Copies one group of the rows of `base` into the warp's slice. Lane c holds the row of column c,
// -1 for none.
template <int kTiles>
__device__ __forceinline__ void stage_rows(uint32_t slice, const __nv_bfloat16* base, int row_size,
                                           int row, int group) {
  const int lane = thread_again() % 32;
  unsigned live = __ballot_sync(~0u, row >= 0);
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    if (((live >> (2 * i)) & 3) == 0) continue;
    int column = 2 * i + lane / 16;
    int r = __shfl_sync(~0u, row, column);
    if (r >= 0)
      copy_async(slice + column * kRowBytes + (lane % 16) * 16,
                 base + (int64_t)r * row_size + group * kGroupSize + (lane % 16) * 8);
  }
}

// Sums over the warps. Thread (warp c, lane r) gets two of column c: row r % 16 of row tiles
// 2 (r / 16) and 2 (r / 16) + 1.
struct Sums {
  float tile[2];
};
// The warps meet in their slices: each uses the one that it multiplied last.
template <int kTiles>
struct Exchange {
  Shared<kTiles>& shared;
  int groups, outers;  // finished

  __device__ __forceinline__ float* words(int warp) const {
    const int items = own_groups(groups, warp) * outers;
    return (float*)&shared.slice[warp][(items - 1) & 1];
  }
  __device__ __forceinline__ Sums operator()(const float (&total)[kRowTiles][4]) const {
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
    float* mine = words(warp);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) mine[exchange_index(r % 2, r / 2, c, lane)] = total[r][c];
    __syncthreads();
    Sums sums = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
#pragma unroll
      for (int h = 0; h < 2; ++h) sums.tile[h] += words(w)[exchange_index_of(h, lane, warp)];
    __syncthreads();
    return sums;
  }
};

// A Work says what a block streams:
//   kRouted           whether columns have a weight per outer; then float2 route(outer, lane)
//   kFlush            whether totals end with each outer
//   outers, groups    the items are outers x groups
//   first_group       added to the group of an item
//   tiled, expert(outer), block(outer)
//   ready()           called between the first weight loads and the first activation
//   stage(slice, cursor)  copies the activations of an item
//   has_token(outer, column)  whether stage copies that column
//   finish(outer, total, exchange)  takes the totals of this warp; called by all warps
template <int kTiles>
__device__ __forceinline__ void clear_zeros(Shared<kTiles>& shared) {
  if (threadIdx.x < kGroupSize * 2 / 16) shared.zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

// Needs a barrier between clear_zeros and here.
template <int kTiles, class Work>
__device__ __forceinline__ void stream(Work& work, Shared<kTiles>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tiled& tiled = work.tiled;
  const int stride = tiled.blocks * kTileBytes;  // from one k16 step to the next
  const bool has_items = warp < work.groups && work.outers > 0;

  auto start_outer = [&](Cursor& c, int outer) {
    c.outer = outer;
    c.group = warp;
    c.index = (work.expert(outer) * tiled.groups + work.first_group + warp) * tiled.blocks;
  };
  // At the end of the list, outer is work.outers.
  auto advance = [&](Cursor& c) {
    c.group += kWarps;
    c.index += kWarps * tiled.blocks;
    if (c.group < work.groups) return;
    if (c.outer + 1 < work.outers)
      start_outer(c, c.outer + 1);
    else
      ++c.outer;
  };
  auto tile_of = [&](const Cursor& c) {
    return tiled.weight + ((int64_t)c.index * kSteps + work.block(c.outer)) * kTileBytes + lane * 16;
  };
  auto stage_scale = [&](Slice<kTiles>& slice, const Cursor& c) {
    if (lane < kBlockRows / 8)
      copy_async(shared_address(slice.scale) + 16 * lane,
                 tiled.scale + ((int64_t)c.index + work.block(c.outer)) * kBlockRows + 8 * lane);
  };

  uint4 slot[kSteps];
  float total[kTiles][kRowTiles][4] = {};
  const Unpack unpack;
  Slice<kTiles>* slices = shared.slice[warp];

  Cursor next;
  if (has_items) {
    start_outer(next, 0);
    const uint8_t* tile = tile_of(next);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load_once(slot[s], tile + s * stride);
    stage_scale(slices[0], next);
  }
  work.ready();
  if (has_items) {
    work.stage(shared_address(slices[0].rows), next);
    advance(next);
  }
  copy_commit();

  int outer = 0, turn = 0;  // slices[turn] is multiplied
  // Multiplies the item that is in `slot`, and loads the next one there step by step.
  auto multiply = [&](auto has_next, Slice<kTiles>& slice) {
    const uint8_t* tile = nullptr;
    if constexpr (decltype(has_next)::value) tile = tile_of(next);
    float sum[kTiles][kRowTiles][4] = {};
    float offset[kTiles][4] = {};
    const uint32_t minus[4] = {kMinusOffset, kMinusOffset, kMinusOffset, kMinusOffset};
    uint32_t b_address[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      b_address[n] = shared_address(work.has_token(outer, 8 * n + b_column(lane))
                                        ? slice.rows + n * 8 * kRowBytes + b_offset(lane)
                                        : (uint8_t*)shared.zeros);
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      uint32_t b[kTiles][4];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) load_b(b[n], b_address[n] + s * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t words[kRowTiles] = {slot[s + half].x, slot[s + half].y, slot[s + half].z, slot[s + half].w};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          uint32_t a[4];
          unpack(a, words[r]);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma(sum[n][r], a, b[n][2 * half], b[n][2 * half + 1]);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma(offset[n], minus, b[n][2 * half], b[n][2 * half + 1]);
        if constexpr (decltype(has_next)::value) {
          load_once(slot[s + half], tile);
          tile += stride;
          // Keeps the loads where they are written. Not where totals end per outer: it would spill.
          if constexpr (!Work::kFlush) __syncwarp();
        }
      }
    }
    float2 route = make_float2(1.0f, 1.0f);
    if constexpr (Work::kRouted) route = work.route(outer, lane);
    const uint4 scale = *(const uint4*)(slice.scale + (lane / 4) * 8);
    const uint32_t pairs[kRowTiles] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float low = low_half(pairs[r]), high = high_half(pairs[r]);  // rows g and g + 8
      const float factor[4] = {low * route.x, low * route.y, high * route.x, high * route.y};
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) total[n][r][c] += factor[c] * (sum[n][r][c] + offset[n][c]);
    }
    __syncwarp();  // all lanes have read the slice
  };
  auto finish_outer = [&] {
    work.finish(outer, total, Exchange<kTiles>{shared, work.groups, outer + 1});
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) total[n][r][c] = 0.0f;
  };

  // Multiplies an item while the next one is on its way; whether it was the last one of its outer.
  auto take_item = [&] {
    copy_wait<0>();
    __syncwarp();
    Slice<kTiles>& slice = slices[turn];
    turn ^= 1;
    bool ends = true;
    if (next.outer < work.outers) {
      ends = next.outer != outer;
      stage_scale(slices[turn], next);
      work.stage(shared_address(slices[turn].rows), next);
      copy_commit();
      multiply(std::true_type{}, slice);
      advance(next);
    } else {
      multiply(std::false_type{}, slice);
    }
    return ends;
  };
  if constexpr (Work::kFlush) {
    for (; outer < work.outers; ++outer) {
      for (int group = warp; group < work.groups; group += kWarps) take_item();
      finish_outer();  // the warps without items too: it has barriers
    }
  } else {
    // One loop, not two: from two, ptxas 13.0.88 made code for sm_90 in which `advance` loaded
    // `outers` into the register of next.outer and used that once more: on an H100 decode_down read
    // weights from anywhere. `++c.outer` leaves it nothing to load; read SASS again after a change.
    while (has_items && outer < work.outers)
      if (take_item()) ++outer;
    work.finish(0, total, Exchange<kTiles>{shared, work.groups, work.outers});
  }
}

// Writes a block's sums: straight to `out` when the split is 1, else as partial sums, of which the
// last block to arrive adds up all, in order of their split, whichever block it is.
//   partial [row block][split][columns][64] floats;  counter: one zeroed word per row block
struct Split {
  float* partial;
  unsigned* counter;
  __nv_bfloat16* out;
  int row_size, columns, splits;
};

template <int kTiles>
__device__ __forceinline__ void write_split(const Split& to, int block, int split, int first_column,
                                            const float (&total)[kTiles][kRowTiles][4],
                                            const Exchange<kTiles>& exchange) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* partial = to.partial + (int64_t)block * to.splits * to.columns * kBlockRows;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const Sums sums = exchange(total[n]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v = sums.tile[h];
      int row = 16 * (h + 2 * (lane / 16)) + lane % 16, column = first_column + 8 * n + warp;
      if (column >= to.columns) continue;
      if (to.splits == 1)
        to.out[(int64_t)column * to.row_size + block * kBlockRows + row] = __float2bfloat16(v);
      else
        partial[((int64_t)split * to.columns + column) * kBlockRows + row] = v;
    }
  }
  if (to.splits == 1) return;

  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the block's partial sums (ordered by the barrier) before its count
    is_last = atomicAdd(to.counter + block, 1) == (unsigned)to.splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (int column = warp; column < to.columns; column += kWarps) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (int s = 0; s < to.splits; ++s) {
      float2 v =
          __ldcg((const float2*)(partial + ((int64_t)s * to.columns + column) * kBlockRows) + lane);
      sum.x += v.x;
      sum.y += v.y;
    }
    *(__nv_bfloat162*)(to.out + (int64_t)column * to.row_size + block * kBlockRows + 2 * lane) =
        __floats2bfloat162_rn(sum.x, sum.y);
  }
}

}  // namespace dsv4
