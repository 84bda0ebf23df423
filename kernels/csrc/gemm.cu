// Plain W4A16 GEMM: out [m][n] = a [m][k] times weight [n][k].
//
//   grid (n / 64, splits of k, chunks of 8 x kTiles rows of a)
//
//              k ->                            a block: 64 output columns, its part of k and chunk;
//   row block  [ split 0 ][ split 1 ] ...      the splits of a block meet in write_split
//
// k is split only while a has one chunk: then there are too few blocks to fill the device.
#include "launch.cuh"
#include "stream.cuh"
#include "w4a16.h"

namespace dsv4 {
namespace {

constexpr int kMaxSplits = 8;
constexpr int kMaxSplitRows = Config<2>::kColumns;

struct Gemm {
  const __nv_bfloat16* a;
  Tiled weight;
  Split out;
  int size_k, split_groups;
};

// A block's part. In shared memory, for want of registers: what is loop-invariant and derived from
// blockIdx would be kept in them.
struct Part {
  int outers, block, first_row, first_group, groups;
};

template <int kTiles>
struct GemmWork {
  static constexpr bool kRouted = false, kFlush = false;
  const Gemm& args;
  Tiled tiled;
  const Part& part;
  const int &outers, &first_group, &groups;

  __device__ __forceinline__ int expert(int) const { return 0; }
  __device__ __forceinline__ int block(int) const { return part.block; }
  __device__ __forceinline__ int row_of(int column) const {
    int row = part.first_row + column;
    return row < args.out.columns ? row : -1;
  }
  __device__ __forceinline__ bool has_token(int, int column) const { return row_of(column) >= 0; }
  __device__ __forceinline__ void ready() const {}
  __device__ __forceinline__ void stage(uint32_t slice, const Cursor& c) const {
    const int lane = thread_again() % 32;
    stage_rows<kTiles>(slice, args.a, args.size_k,
                       lane < Config<kTiles>::kColumns ? row_of(lane) : -1, first_group + c.group);
  }
  __device__ __forceinline__ void finish(int, const float (&total)[kTiles][kRowTiles][4],
                                         const Exchange<kTiles>& exchange) {
    write_split<kTiles>(args.out, blockIdx.x, blockIdx.y, part.first_row, total, exchange);
  }
};

template <int kTiles>
__global__ void __launch_bounds__(kThreads, Config<kTiles>::kBlocksPerSm)
    gemm(const __grid_constant__ Gemm args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared<kTiles>& shared = *(Shared<kTiles>*)dynamic;
  __shared__ Part part;
  clear_zeros(shared);
  if (threadIdx.x == 0) {
    part.outers = 1;
    part.block = blockIdx.x;
    part.first_row = blockIdx.z * Config<kTiles>::kColumns;
    part.first_group = blockIdx.y * args.split_groups;
    part.groups = min(args.split_groups, args.weight.groups - part.first_group);
  }
  __syncthreads();
  GemmWork<kTiles> work = {args,        args.weight,      part,
                           part.outers, part.first_group, part.groups};
  stream<kTiles>(work, shared);
}

Gemm lay_out(const Dsv4GemmArgs& a, Pieces& pieces) {
  Gemm args = {};
  args.a = (const __nv_bfloat16*)a.a;
  args.weight = {(const uint8_t*)a.weight, (const __nv_bfloat16*)a.scale, a.size_k / kGroupSize,
                 a.size_n / kBlockRows};
  args.size_k = a.size_k;
  args.out.out = (__nv_bfloat16*)a.out;
  args.out.row_size = a.size_n;
  args.out.columns = a.size_m;
  int rows = a.size_m < kMaxSplitRows ? a.size_m : kMaxSplitRows;
  args.out.counter = pieces.take<unsigned>(args.weight.blocks);
  args.out.partial = pieces.take<float>((size_t)kMaxSplits * rows * a.size_n);
  return args;
}

template <int kTiles>
cudaError_t run_tiles(Gemm& args, cudaStream_t stream) {
  const int blocks = args.weight.blocks, groups = args.weight.groups;
  const int chunks = divide_up(args.out.columns, Config<kTiles>::kColumns);
  Device device;
  int index;
  cudaError_t error = current_device(&device, &index);
  if (error != cudaSuccess) return error;

  // One wave of blocks, and at least one group for each warp of a block.
  int splits = chunks > 1 ? 1 : Config<kTiles>::kBlocksPerSm * device.multiprocessors / blocks;
  splits = splits > groups / kWarps ? groups / kWarps : splits;
  splits = splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
  args.split_groups = divide_up(groups, splits);
  args.out.splits = divide_up(groups, args.split_groups);
  if (args.out.splits > 1) {
    error = cudaMemsetAsync(args.out.counter, 0, blocks * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  return launch<gemm<kTiles>>(dim3(blocks, args.out.splits, chunks), kThreads,
                              sizeof(Shared<kTiles>), false, stream, args);
}

bool is_supported(int32_t size_m, int32_t size_n, int32_t size_k) {
  constexpr int kMaxChunks = 65535;  // of a grid's z
  return size_m >= 0 && size_m <= kMaxChunks * Config<2>::kColumns && size_n > 0 &&
         size_n % kBlockRows == 0 && size_k > 0 && size_k % kGroupSize == 0 &&
         // a k16 step's stride times the steps of a group, in an int
         (int64_t)size_n / kBlockRows * kTileBytes * kSteps <= INT32_MAX;
}

}  // namespace
}  // namespace dsv4

extern "C" size_t dsv4_gemm_workspace_bytes(int32_t size_m, int32_t size_n, int32_t size_k) {
  if (!dsv4::is_supported(size_m, size_n, size_k)) return 0;
  Dsv4GemmArgs args = {};
  args.size_m = size_m;
  args.size_n = size_n;
  args.size_k = size_k;
  dsv4::Pieces pieces = {nullptr};
  dsv4::lay_out(args, pieces);
  return pieces.used;
}

extern "C" int dsv4_gemm(const Dsv4GemmArgs* args, void* stream) {
  if (!dsv4::is_supported(args->size_m, args->size_n, args->size_k)) return cudaErrorInvalidValue;
  if (args->size_m == 0) return cudaSuccess;
  dsv4::Pieces pieces = {(char*)args->workspace};
  dsv4::Gemm gemm = dsv4::lay_out(*args, pieces);
  if (args->size_m <= 8) return dsv4::run_tiles<1>(gemm, (cudaStream_t)stream);
  return dsv4::run_tiles<2>(gemm, (cudaStream_t)stream);
}
