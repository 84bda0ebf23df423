// MoE for more than 8 tokens: pairs (token, slot) sorted by expert, a block per expert and rows.
//
//   sort      one block: which experts are live, and each one's list of pairs
//   gate + up grid (row blocks / kUpRows, live experts)         --> act [pair][inter]
//   down      grid (row blocks / kDownRows, live experts)       --> down [pair][hidden]
//   sum       one block per token: its top_k rows, in slot order
//
//                  expert's pairs, 8 x kTiles at a time ->
//   row block 0    [ chunk 0 ][ chunk 1 ] ...     a block walks the chunks and, for each, its row
//   row block 1    [ chunk 0 ][ chunk 1 ] ...     blocks; weights come from L2 after the first chunk
//
// A pair's result does not depend on its column nor on its neighbours, so neither does the output
// on the order in which `sort` places the pairs of an expert.
#include "moe.cuh"

namespace dsv4 {
namespace {

constexpr int kSortThreads = 1024;
static_assert(kMaxExperts <= kSortThreads, "a thread per expert");
// Row blocks per block: about 128 KB of weights for it to stream at DeepSeek's sizes.
constexpr int kUpRows = 1, kDownRows = 4;  // row_bits knows these
// Down's rows are FP32 up to here, and BF16 beyond, where FP32 would be most of the traffic and of
// the workspace.
constexpr int kFloatTokens = 256;

struct Group {
  int expert, first, count, unused;  // its pairs are sorted[first .. first + count)
};

struct Grouped {
  Moe moe;
  Group* groups;       // [grid of experts], live ones first, then count = 0
  int* sorted;         // pairs, by expert
  __nv_bfloat16* act;  // [pair][inter_size]
  void* down;          // [pair][hidden_size], FP32 or BF16
  int num_pairs, num_groups;
  bool down_is_float;
};

// Exclusive sum of v over the block; `all` gets the total.
__device__ __forceinline__ int sum_before(int v, int* warps, int* all) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sum = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kSortThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  __syncthreads();
  *all = total;
  return before + sum - v;
}

__global__ void __launch_bounds__(kSortThreads, 1)
    sort_pairs(const __grid_constant__ Grouped args) {
  __shared__ int place[kMaxExperts];
  __shared__ int warps[kSortThreads / 32];
  const int thread = threadIdx.x;
  place[thread] = 0;
  wait_for_previous_kernel();
  let_next_kernel_start();
  __syncthreads();
  for (int p = thread; p < args.num_pairs; p += kSortThreads) {
    int id = args.moe.topk_ids[p];
    if ((unsigned)id < (unsigned)args.moe.num_experts) atomicAdd(&place[id], 1);
  }
  __syncthreads();
  int count = place[thread], all, live;
  int first = sum_before(count, warps, &all);
  int index = sum_before(count > 0, warps, &live);
  place[thread] = first;
  if (count > 0) *(int4*)&args.groups[index] = make_int4(thread, first, count, 0);
  for (int g = live + thread; g < args.num_groups; g += kSortThreads)
    *(int4*)&args.groups[g] = make_int4(0, 0, 0, 0);
  __syncthreads();
  for (int p = thread; p < args.num_pairs; p += kSortThreads) {
    int id = args.moe.topk_ids[p];
    if ((unsigned)id < (unsigned)args.moe.num_experts) args.sorted[atomicAdd(&place[id], 1)] = p;
  }
}

// Past L1: down reads the lists before its wait, when L1 may still hold an earlier layer's.
__device__ __forceinline__ Group load_group(const Group* g) {
  int4 v = __ldcg((const int4*)g);
  return {v.x, v.y, v.z, 0};
}

// What a block works on. In shared memory, for want of registers.
template <int kTiles>
struct Job {
  Group group;
  int first_block, row_bits, outers;  // 1 << row_bits row blocks
  int pairs[Config<kTiles>::kColumns];  // of chunk 0
};

// Takes the job of this block. False: none, leave.
template <int kTiles>
__device__ __forceinline__ bool take_job(Job<kTiles>& job, const Grouped& args, const Tiled& tiled,
                                         int rows) {
  Group group = load_group(args.groups + blockIdx.y);
  if (group.count == 0) return false;
  if (threadIdx.x == 0) {
    job.group = group;
    job.first_block = blockIdx.x * rows;
    // Blocks are even in number, so the last block of threads has 2 where others have 4.
    job.row_bits = rows == 1 ? 0 : tiled.blocks - job.first_block >= 4 ? 2 : 1;
    job.outers = (group.count + Config<kTiles>::kColumns - 1) / Config<kTiles>::kColumns
                 << job.row_bits;
  }
  __syncthreads();
  return true;
}

template <int kTiles, int kRows>
struct GroupWork {
  static constexpr bool kRouted = false, kFlush = true;
  static constexpr int kColumns = Config<kTiles>::kColumns;
  static constexpr int first_group = 0;
  const Grouped& args;
  Job<kTiles>& job;
  Tiled tiled;
  const int& outers;
  int groups;

  __device__ __forceinline__ GroupWork(const Grouped& args, Job<kTiles>& job, const Tiled& tiled)
      : args(args), job(job), tiled(tiled), outers(job.outers), groups(tiled.groups) {}

  // An outer is (chunk of columns, row block).
  __device__ __forceinline__ int expert(int) const { return job.group.expert; }
  __device__ __forceinline__ int block(int outer) const {
    if constexpr (kRows == 1) return job.first_block;
    return job.first_block + (outer & ((1 << job.row_bits) - 1));
  }
  __device__ __forceinline__ int first_column(int outer) const {
    return (kRows == 1 ? outer : outer >> job.row_bits) * kColumns;
  }
  __device__ __forceinline__ bool has_token(int outer, int column) const {
    return first_column(outer) + column < job.group.count;
  }
  __device__ __forceinline__ int pair_of(int outer, int column) const {
    int i = first_column(outer) + column;
    if (i >= job.group.count) return -1;
    return i < kColumns ? job.pairs[i] : __ldcg(args.sorted + job.group.first + i);
  }
  __device__ __forceinline__ int lane_pair(int outer) const {
    int lane = threadIdx.x % 32;
    return lane < kColumns ? pair_of(outer, lane) : -1;
  }
  __device__ __forceinline__ void load_pairs() {
    if (threadIdx.x < min(kColumns, job.group.count))
      job.pairs[threadIdx.x] = __ldcg(args.sorted + job.group.first + threadIdx.x);
    __syncthreads();
  }
};

template <int kTiles>
struct GroupUp : GroupWork<kTiles, kUpRows> {
  using GroupWork<kTiles, kUpRows>::GroupWork;
  __device__ __forceinline__ void ready() { this->load_pairs(); }
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) {
    int pair = this->lane_pair(c.outer);
    stage_rows<kTiles>(slice, this->args.moe.hidden, this->args.moe.hidden_size,
                       pair < 0 ? -1 : pair / this->args.moe.top_k, c.group);
  }
  __device__ __forceinline__ void finish(int outer, const float (&total)[kTiles][kRowTiles][4],
                                         const Exchange<kTiles>& exchange) {
    write_act<kTiles>(this->args.act, this->args.moe, this->block(outer), total, exchange,
                      [&](int column) { return this->pair_of(outer, column); });
  }
};

template <int kTiles>
struct GroupDown : GroupWork<kTiles, kDownRows> {
  using GroupWork<kTiles, kDownRows>::GroupWork;
  __device__ __forceinline__ void ready() {
    wait_for_previous_kernel();
    let_next_kernel_start();
    this->load_pairs();
  }
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) {
    stage_rows<kTiles>(slice, this->args.act, this->args.moe.inter_size, this->lane_pair(c.outer),
                       c.group);
  }
  __device__ __forceinline__ void finish(int outer, const float (&total)[kTiles][kRowTiles][4],
                                         const Exchange<kTiles>& exchange) {
    const Grouped& args = this->args;
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      int pair = this->pair_of(outer, 8 * n + warp);
      float weight = pair < 0 ? 0.0f : __ldcg(args.moe.topk_weights + pair);
      const Sums sums = exchange(total[n]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v = weight * sums.tile[h];
        if (pair < 0) continue;
        int64_t at = (int64_t)pair * args.moe.hidden_size + this->block(outer) * kBlockRows +
                     16 * (h + 2 * (lane / 16)) + lane % 16;
        if (args.down_is_float)
          ((float*)args.down)[at] = v;
        else
          ((__nv_bfloat16*)args.down)[at] = __float2bfloat16(v);
      }
    }
  }
};

template <int kTiles>
__global__ void __launch_bounds__(kThreads, Config<kTiles>::kBlocksPerSm)
    grouped_up(const __grid_constant__ Grouped args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<kTiles>& shared = *(Shared<kTiles>*)dynamic;
  __shared__ Job<kTiles> job;
  clear_zeros(shared);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!take_job(job, args, args.moe.w13, kUpRows)) return;
  GroupUp<kTiles> work(args, job, args.moe.w13);
  stream<kTiles>(work, shared);
}

template <int kTiles>
__global__ void __launch_bounds__(kThreads, Config<kTiles>::kBlocksPerSm)
    grouped_down(const __grid_constant__ Grouped args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<kTiles>& shared = *(Shared<kTiles>*)dynamic;
  __shared__ Job<kTiles> job;
  clear_zeros(shared);
  if (!take_job(job, args, args.moe.w2, kDownRows)) {
    wait_for_previous_kernel();  // else this kernel could end before it, and the next one start
    return;
  }
  GroupDown<kTiles> work(args, job, args.moe.w2);
  stream<kTiles>(work, shared);
}

// Eight values of a row of `down`, added to sum.
__device__ __forceinline__ void add_eight(float (&sum)[8], const float* row) {
  float4 a = __ldcg((const float4*)row), b = __ldcg((const float4*)row + 1);
  const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += v[i];
}
__device__ __forceinline__ void add_eight(float (&sum)[8], const __nv_bfloat16* row) {
  uint4 a = __ldcg((const uint4*)row);
  const uint32_t v[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += low_half(v[i]);
    sum[2 * i + 1] += high_half(v[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_slots(const __grid_constant__ Grouped args) {
  const Moe& moe = args.moe;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const T* rows = (const T*)args.down + (int64_t)blockIdx.x * moe.top_k * moe.hidden_size;
  const int32_t* ids = moe.topk_ids + (int64_t)blockIdx.x * moe.top_k;
  int i = 8 * (blockIdx.y * kThreads + threadIdx.x);
  if (i >= moe.hidden_size) return;
  float sum[8] = {};
#pragma unroll 4
  for (int s = 0; s < moe.top_k; ++s)
    if ((unsigned)ids[s] < (unsigned)moe.num_experts)
      add_eight(sum, rows + (int64_t)s * moe.hidden_size + i);
  union {
    __nv_bfloat162 pairs[4];
    uint4 all;
  } v;
#pragma unroll
  for (int k = 0; k < 4; ++k) v.pairs[k] = __floats2bfloat162_rn(sum[2 * k], sum[2 * k + 1]);
  *(uint4*)(moe.out + (int64_t)blockIdx.x * moe.hidden_size + i) = v.all;
}

Grouped lay_out(const Moe& moe, int num_tokens, Pieces& pieces) {
  Grouped args = {};
  args.moe = moe;
  args.num_pairs = num_tokens * moe.top_k;
  args.num_groups = args.num_pairs < moe.num_experts ? args.num_pairs : moe.num_experts;
  args.down_is_float = num_tokens <= kFloatTokens;
  args.groups = pieces.take<Group>(args.num_groups);
  args.sorted = pieces.take<int>(args.num_pairs);
  args.act = pieces.take<__nv_bfloat16>((size_t)args.num_pairs * moe.inter_size);
  args.down =
      pieces.take<char>((size_t)args.num_pairs * moe.hidden_size * (args.down_is_float ? 4 : 2));
  return args;
}

template <int kTiles>
cudaError_t run_tiles(const Grouped& args, cudaStream_t stream) {
  const Moe& moe = args.moe;
  cudaError_t error =
      launch<grouped_up<kTiles>>(dim3(divide_up(moe.w13.blocks, kUpRows), args.num_groups),
                                 kThreads, sizeof(Shared<kTiles>), true, stream, args);
  if (error != cudaSuccess) return error;
  return launch<grouped_down<kTiles>>(dim3(divide_up(moe.w2.blocks, kDownRows), args.num_groups),
                                      kThreads, sizeof(Shared<kTiles>), true, stream, args);
}

}  // namespace

size_t grouped_workspace_bytes(const Moe& moe) {
  Pieces all = {nullptr};
  lay_out(moe, moe.num_tokens, all);
  if (moe.num_tokens <= kFloatTokens) return all.used;
  Pieces fewer = {nullptr};  // fewer tokens can need more, in FP32
  lay_out(moe, kFloatTokens, fewer);
  return all.used > fewer.used ? all.used : fewer.used;
}

cudaError_t run_grouped(const Moe& moe, void* workspace, cudaStream_t stream) {
  Pieces pieces = {(char*)workspace};
  Grouped args = lay_out(moe, moe.num_tokens, pieces);
  cudaError_t error = launch<sort_pairs>(dim3(1), kSortThreads, 0, true, stream, args);
  if (error != cudaSuccess) return error;

  // Columns per pass from the mean number of pairs of an expert, with room for its spread.
  int64_t pairs = args.num_pairs, experts = moe.num_experts;
  if (pairs <= 4 * experts)
    error = run_tiles<1>(args, stream);
  else
    error = run_tiles<2>(args, stream);
  if (error != cudaSuccess) return error;

  dim3 grid(moe.num_tokens, divide_up(moe.hidden_size, 8 * kThreads));
  if (args.down_is_float) return launch<sum_slots<float>>(grid, kThreads, 0, true, stream, args);
  return launch<sum_slots<__nv_bfloat16>>(grid, kThreads, 0, true, stream, args);
}

}  // namespace dsv4
