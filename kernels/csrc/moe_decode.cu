// MoE for at most 8 tokens: two launches, straight from the top-k ids.
//
//   gate + up   grid (2 * inter / 64, entries)       down   grid (hidden / 64, splits)
//
//     row blocks ->                                    row blocks ->
//   entry 0 [ ][ ][ ][ ] expert of (token 0, slot 0)   split 0 [ ][ ][ ]  entries 0 .. n - 1
//   entry 1 [ ][ ][ ][ ] ...                           split 1 [ ][ ][ ]  entries n .. 2n - 1
//
// An entry is a (token, slot). The first entry that names an expert stands for it, with all tokens
// that chose it as columns (column = token); the others leave. So each expert is read once and
// nothing is sorted. Where blocks of gate + up have to wait for others to end, `decode_up_in_turn`
// takes its place, with as many blocks as run at once, each with expert after expert: 1.5 waves of
// blocks take as long as 2. Down starts while gate + up still runs and loads its first weights before
// it waits for the activations. Its splits meet in write_split.
#include "moe.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxEntries = kDecodeTokens * kMaxTopK;
constexpr int kMaxSplits = 8;
constexpr int kMaxSplitEntries = kThreads / kDecodeTokens;  // find_experts: a thread per pair
static_assert(kMaxSplitEntries * kMaxSplits >= kMaxEntries, "splits cover every entry");
static_assert(kMaxEntries <= kThreads, "a thread loads an entry");

struct Decode {
  Moe moe;
  __nv_bfloat16* act;  // [entry][inter_size], written for first entries of a token only
  Split down;
  int split_entries;
};

struct Entries {
  int ids[kMaxEntries];
  float weights[kMaxEntries];
};

// Past L1: down reads these before its wait, when L1 may still hold an earlier step's.
__device__ __forceinline__ void load_entries(Entries& entries, const Moe& moe) {
  int n = moe.num_tokens * moe.top_k;
  if (threadIdx.x < n) {
    entries.ids[threadIdx.x] = __ldcg(moe.topk_ids + threadIdx.x);
    entries.weights[threadIdx.x] = __ldcg(moe.topk_weights + threadIdx.x);
  }
}

struct Column {
  int entry;     // where the token names the expert first, -1: nowhere
  float weight;  // over all slots that name it
  bool stands;   // the expert's block of 8 lanes stands for this expert (same in all 8 lanes)
  int expert;
};

// The column of `token` for the expert that `entry` names. Lanes 8 i .. 8 i + 7 ask about one entry
// and tokens 0 .. 7.
__device__ __forceinline__ Column find_column(const Entries& entries, const Moe& moe, int entry,
                                              int token) {
  Column column = {-1, 0.0f, false, -1};
  if (entry < moe.num_tokens * moe.top_k) column.expert = entries.ids[entry];
  bool valid = (unsigned)column.expert < (unsigned)moe.num_experts;
  if (valid && token < moe.num_tokens) {
    for (int s = moe.top_k - 1; s >= 0; --s) {
      int other = token * moe.top_k + s;
      if (entries.ids[other] == column.expert) {
        column.entry = other;
        column.weight += entries.weights[other];
      }
    }
  }
  int first = column.entry < 0 ? kMaxEntries : column.entry;
#pragma unroll
  for (int d = 1; d < 8; d *= 2) first = min(first, __shfl_xor_sync(~0u, first, d));
  column.stands = valid && first == entry;
  return column;
}

// The experts that a block works on, in order of their entries, and its row block. In shared
// memory, for want of registers.
struct Experts {
  int block, all;
  int count[kWarps];
  int expert[kMaxSplitEntries];
  int entry[kMaxSplitEntries][kDecodeTokens];  // where token t first names the expert, -1: nowhere
  float weight[kMaxSplitEntries][kDecodeTokens];
};

// Fills `experts` from `count` entries from `first` on. Barriers inside.
__device__ __forceinline__ void find_experts(Experts& experts, const Entries& entries,
                                             const Moe& moe, int first, int count) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int local = threadIdx.x / kDecodeTokens, token = threadIdx.x % kDecodeTokens;
  Column column = find_column(entries, moe, local < count ? first + local : kMaxEntries, token);
  unsigned standing = __ballot_sync(~0u, column.stands);  // 8 bits each
  if (lane == 0) experts.count[warp] = __popc(standing) / 8;
  __syncthreads();
  int place = __popc(standing & ((1u << (lane & ~7)) - 1)) / 8, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += experts.count[w];
    all += experts.count[w];
  }
  if (column.stands) {
    experts.expert[place] = column.expert;
    experts.entry[place][token] = column.entry;
    experts.weight[place][token] = column.weight;
  }
  if (threadIdx.x == 0) {
    experts.block = blockIdx.x;
    experts.all = all;
  }
  __syncthreads();
}

// What a warp of gate + up works on, found by each warp for itself, without a barrier.
struct Expert {
  int id;     // -1: this entry does not stand for an expert
  int entry;  // of token lane % 8: where it first names the expert, -1: nowhere
};

__device__ __forceinline__ Expert find_expert(const Moe& moe, int entry) {
  const int lane = threadIdx.x % 32, entries = moe.num_tokens * moe.top_k;
  const int id = __ldcg(moe.topk_ids + entry);
  int ids[kMaxEntries / 32];
#pragma unroll
  for (int w = 0; w < kMaxEntries / 32; ++w)
    ids[w] = 32 * w + lane < entries ? __ldcg(moe.topk_ids + 32 * w + lane) : -1;
  Expert expert = {-1, -1};
  if ((unsigned)id >= (unsigned)moe.num_experts) return expert;
  const int first = lane % kDecodeTokens * moe.top_k;  // of the lane's token
  int earliest = -1;
#pragma unroll
  for (int w = 0; w < kMaxEntries / 32; ++w) {
    unsigned named = __ballot_sync(~0u, ids[w] == id);
    if (earliest < 0 && named != 0) earliest = 32 * w + __ffs(named) - 1;
    int from = max(first - 32 * w, 0), to = min(first + moe.top_k - 32 * w, 32);
    if (from >= to || expert.entry >= 0) continue;
    unsigned own = named & (~0u << from) & (~0u >> (32 - to));
    if (own != 0) expert.entry = 32 * w + __ffs(own) - 1;
  }
  if (earliest == entry) expert.id = id;
  return expert;
}

struct UpWork {
  static constexpr bool kRouted = false, kFlush = false;
  static constexpr int outers = 1, first_group = 0;
  const Decode& args;
  Expert found;
  Tiled tiled;
  int groups;

  __device__ __forceinline__ int expert(int) const { return found.id; }
  __device__ __forceinline__ int block(int) const { return blockIdx.x; }
  __device__ __forceinline__ bool has_token(int, int) const { return found.entry >= 0; }
  __device__ __forceinline__ void ready() const { __syncthreads(); }  // the zeros are there
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) const {
    const int lane = thread_again() % 32;
    stage_rows<1>(slice, args.moe.hidden, args.moe.hidden_size,
                  lane < kDecodeTokens && found.entry >= 0 ? lane : -1, c.group);
  }
  __device__ __forceinline__ void finish(int, const float (&total)[1][kRowTiles][4],
                                         const Exchange<1>& exchange) {
    write_act<1>(args.act, args.moe, blockIdx.x, total, exchange,
                 [&](int token) { return __shfl_sync(~0u, found.entry, token); });
  }
};

// How gate + up begins: after this the ids may be read, and down finds its counters at zero.
__device__ __forceinline__ void begin_up(const Decode& args, Shared<1>& shared) {
  clear_zeros(shared);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int i = threadIdx.x; i < args.moe.w2.blocks; i += kThreads) args.down.counter[i] = 0;
}

__global__ void __launch_bounds__(kThreads, 2) decode_up(const __grid_constant__ Decode args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<1>& shared = *(Shared<1>*)dynamic;
  const Moe& moe = args.moe;
  begin_up(args, shared);
  Expert found = find_expert(moe, blockIdx.y);
  if (found.id < 0) return;
  UpWork work = {args, found, moe.w13, moe.w13.groups};
  stream<1>(work, shared);
}

// The experts that a step names, in order of the entries that stand for them.
struct Chosen {
  int expert[kMaxEntries];
  int entry[kMaxEntries][kDecodeTokens];  // where token t first names it, kNowhere: nowhere
  int outers[kWarps];  // of this block, for want of a register; each warp writes its own
};
constexpr int kNowhere = kMaxEntries;

// A warp's view of all entries, in words of 32: lane l of word w holds entry 32 w + l. Each warp
// makes its own, so that none waits for another before it loads weights.
struct Votes {
  static constexpr int kWords = kMaxEntries / 32;
  int id[kWords];             // -1: none, or out of range
  int first[kWords];          // the entry that stands for this one's expert
  unsigned standing[kWords];  // bits of the entries that stand
  int count;                  // of them

  // Experts before the one that `entry` stands for.
  __device__ __forceinline__ int rank(int entry) const {
    int rank = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int below = entry - 32 * w;
      rank += __popc(below >= 32 ? standing[w] : below <= 0 ? 0 : standing[w] & ((1u << below) - 1));
    }
    return rank;
  }
  // The expert of a rank below `count`.
  __device__ __forceinline__ int expert(int wanted) const {
    const int lane = threadIdx.x % 32;
    int expert = -1;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const bool is_it = (standing[w] >> lane & 1) && rank(32 * w + lane) == wanted;
      const unsigned found = __ballot_sync(~0u, is_it);
      if (found != 0) expert = __shfl_sync(~0u, id[w], __ffs(found) - 1);
    }
    return expert;
  }
};

__device__ __forceinline__ Votes vote(const Moe& moe) {
  const int lane = threadIdx.x % 32, entries = moe.num_tokens * moe.top_k;
  Votes votes;
#pragma unroll
  for (int w = 0; w < Votes::kWords; ++w) {
    const int id = 32 * w + lane < entries ? __ldcg(moe.topk_ids + 32 * w + lane) : -1;
    votes.id[w] = (unsigned)id < (unsigned)moe.num_experts ? id : -1;
  }
  votes.count = 0;
#pragma unroll
  for (int w = 0; w < Votes::kWords; ++w) {
    votes.first[w] = kNowhere;
    votes.standing[w] = 0;
    if (32 * w >= entries) continue;
    votes.first[w] = 32 * w + __ffs(__match_any_sync(~0u, votes.id[w])) - 1;
#pragma unroll
    for (int v = w - 1; v >= 0; --v)
#pragma unroll 1
      for (int l = 31; l >= 0; --l)
        if (__shfl_sync(~0u, votes.id[v], l) == votes.id[w]) votes.first[w] = 32 * v + l;
    votes.standing[w] = __ballot_sync(~0u, votes.id[w] >= 0 && votes.first[w] == 32 * w + lane);
    votes.count += __popc(votes.standing[w]);
  }
  return votes;
}

// Done by one warp; the others see it after a barrier.
__device__ __forceinline__ void write_chosen(Chosen& chosen, const Votes& votes, const Moe& moe) {
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < votes.count * kDecodeTokens; i += 32) (&chosen.entry[0][0])[i] = kNowhere;
  __syncwarp();
#pragma unroll
  for (int w = 0; w < Votes::kWords; ++w) {
    if (votes.id[w] < 0) continue;
    const int entry = 32 * w + lane, rank = votes.rank(votes.first[w]);
    if (votes.first[w] == entry) chosen.expert[rank] = votes.id[w];
    atomicMin(&chosen.entry[rank][entry / moe.top_k], entry);
  }
}

// blockIdx.y, not kept in a register either.
__device__ __forceinline__ int row_again() {
  int row;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(row));
  return row;
}

// Ranks blockIdx.y, blockIdx.y + gridDim.y, ...
struct UpInTurnWork {
  static constexpr bool kRouted = false, kFlush = true;
  static constexpr int first_group = 0;
  const Decode& args;
  const Chosen& chosen;
  int first_expert;  // known before `chosen` is
  const int& outers;
  Tiled tiled;
  int groups;

  __device__ __forceinline__ int rank(int outer) const { return row_again() + outer * gridDim.y; }
  __device__ __forceinline__ int expert(int outer) const {
    return outer == 0 ? first_expert : chosen.expert[rank(outer)];
  }
  __device__ __forceinline__ int block(int) const { return blockIdx.x; }
  __device__ __forceinline__ bool has_token(int outer, int token) const {
    return chosen.entry[rank(outer)][token] != kNowhere;
  }
  __device__ __forceinline__ void ready() const { __syncthreads(); }  // the zeros and `chosen`
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) const {
    const int lane = thread_again() % 32;
    stage_rows<1>(slice, args.moe.hidden, args.moe.hidden_size,
                  lane < kDecodeTokens && has_token(c.outer, lane) ? lane : -1, c.group);
  }
  __device__ __forceinline__ void finish(int outer, const float (&total)[1][kRowTiles][4],
                                         const Exchange<1>& exchange) {
    write_act<1>(args.act, args.moe, blockIdx.x, total, exchange, [&](int token) {
      const int entry = chosen.entry[rank(outer)][token];
      return entry == kNowhere ? -1 : entry;
    });
  }
};

__global__ void __launch_bounds__(kThreads, 2)
    decode_up_in_turn(const __grid_constant__ Decode args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<1>& shared = *(Shared<1>*)dynamic;
  __shared__ Chosen chosen;
  const Moe& moe = args.moe;
  begin_up(args, shared);
  const Votes votes = vote(moe);
  const int outers = divide_up(votes.count - (int)blockIdx.y, (int)gridDim.y);
  if (outers <= 0) return;
  if (threadIdx.x / 32 == kWarps - 1) write_chosen(chosen, votes, moe);
  if (threadIdx.x % 32 == 0) chosen.outers[threadIdx.x / 32] = outers;
  __syncwarp();
  UpInTurnWork work = {args,    chosen, votes.expert(blockIdx.y), chosen.outers[threadIdx.x / 32],
                       moe.w13, moe.w13.groups};
  stream<1>(work, shared);
}

struct DownWork {
  static constexpr bool kRouted = true, kFlush = false;
  const Decode& args;
  const Experts& experts;
  Tiled tiled;
  const int& outers;
  int groups;
  static constexpr int first_group = 0;

  __device__ __forceinline__ int expert(int outer) const { return experts.expert[outer]; }
  __device__ __forceinline__ int block(int) const { return experts.block; }
  __device__ __forceinline__ float2 route(int outer, int lane) const {
    return *(const float2*)&experts.weight[outer][2 * (lane % 4)];
  }
  __device__ __forceinline__ bool has_token(int outer, int token) const {
    return experts.entry[outer][token] >= 0;
  }
  __device__ __forceinline__ void ready() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) const {
    const int lane = thread_again() % 32;
    int row = lane < kDecodeTokens ? experts.entry[c.outer][lane] : -1;
    stage_rows<1>(slice, args.act, args.moe.inter_size, row, c.group);
  }
  __device__ __forceinline__ void finish(int, const float (&total)[1][kRowTiles][4],
                                         const Exchange<1>& exchange) {
    write_split<1>(args.down, blockIdx.x, blockIdx.y, 0, total, exchange);
  }
};

__global__ void __launch_bounds__(kThreads, 2) decode_down(const __grid_constant__ Decode args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<1>& shared = *(Shared<1>*)dynamic;
  __shared__ Entries entries;
  __shared__ __align__(8) Experts experts;
  const Moe& moe = args.moe;
  clear_zeros(shared);

  load_entries(entries, moe);
  __syncthreads();
  find_experts(experts, entries, moe, blockIdx.y * args.split_entries, args.split_entries);
  DownWork work = {args, experts, moe.w2, experts.all, moe.w2.groups};
  stream<1>(work, shared);
}

Decode lay_out(const Moe& moe, Pieces& pieces) {
  Decode args = {};
  args.moe = moe;
  args.act = pieces.take<__nv_bfloat16>((size_t)moe.num_tokens * moe.top_k * moe.inter_size);
  args.down.counter = pieces.take<unsigned>(moe.w2.blocks);
  args.down.partial = pieces.take<float>((size_t)kMaxSplits * moe.num_tokens * moe.hidden_size);
  args.down.out = moe.out;
  args.down.row_size = moe.hidden_size;
  args.down.columns = moe.num_tokens;
  return args;
}

}  // namespace

size_t decode_workspace_bytes(const Moe& moe) {
  Pieces pieces = {nullptr};
  lay_out(moe, pieces);
  return pieces.used;
}

cudaError_t run_decode(const Moe& moe, void* workspace, cudaStream_t stream) {
  Pieces pieces = {(char*)workspace};
  Decode args = lay_out(moe, pieces);
  Device device;
  int index;
  cudaError_t error = current_device(&device, &index);
  if (error != cudaSuccess) return error;

  // As many splits as run at once, two blocks per multiprocessor: one wave, without a tail.
  int entries = moe.num_tokens * moe.top_k;
  int splits = 2 * device.multiprocessors / moe.w2.blocks;
  splits = splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
  args.split_entries = divide_up(entries, splits);
  if (args.split_entries > kMaxSplitEntries) args.split_entries = kMaxSplitEntries;
  args.down.splits = divide_up(entries, args.split_entries);

  // Of three waves and more the last one matters less than that the device deals blocks to whoever
  // is free.
  const int rows = max(1, 2 * device.multiprocessors / moe.w13.blocks);  // at once
  if (entries <= rows || entries >= 3 * rows)
    error = launch<decode_up>(dim3(moe.w13.blocks, entries), kThreads, sizeof(Shared<1>), true,
                              stream, args);
  else
    error = launch<decode_up_in_turn>(dim3(moe.w13.blocks, rows), kThreads, sizeof(Shared<1>), true,
                                      stream, args);
  if (error != cudaSuccess) return error;
  return launch<decode_down>(dim3(moe.w2.blocks, args.down.splits), kThreads, sizeof(Shared<1>),
                             true, stream, args);
}

}  // namespace dsv4
