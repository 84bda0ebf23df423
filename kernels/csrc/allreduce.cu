// The all-reduce kernel; its steps are in allreduce_protocol.cuh.
//
// Blocks do not wait for each other, only for the same lines of the peer: up to 16 small ones, so that
// they find room beside other kernels. A peer's blocks start in the order of their index, as ours.
#include <cuda_runtime.h>

#include "allreduce.h"
#include "allreduce_protocol.cuh"
#include "launch.cuh"

namespace dsv4 {
namespace {

template <int kWide>
__global__ void __launch_bounds__(kAllReduceThreads)
    all_reduce(const __grid_constant__ Dsv4AllReduceArgs a) {
  if (load_local(&a.state->aborted)) return;
  uint32_t generation = load_local(&a.state->generation);
  int step = (int)(gridDim.x * kAllReduceThreads);
  int first = (int)(blockIdx.x * kAllReduceThreads + threadIdx.x);
  push(a, generation, first, step);
  bool cleared = first < kWindowLines && clear_old(a, generation, first);
  uint32_t hash = kHashStart;
  bool good = collect<kWide>(a, generation, (int)blockIdx.x, first, step, hash);
  bool hashed = add_hash(a, generation, first, hash);
  // Cleared: before the next call's lines tell the peer that it may write there.
  if (cleared || hashed) fence_system();
  if (__syncthreads_and(good) && threadIdx.x == 0) finish(a, generation, (int)gridDim.x);
}

}  // namespace
}  // namespace dsv4

extern "C" size_t dsv4_allreduce_inbox_bytes(int32_t world_size, int32_t max_bytes) {
  return dsv4::allreduce_inbox_bytes(world_size, max_bytes);
}

extern "C" int dsv4_allreduce(const Dsv4AllReduceArgs* args, void* stream) {
  if (!dsv4::allreduce_is_supported(*args)) return cudaErrorInvalidValue;
  if (args->num_bytes == 0) return cudaSuccess;
  int blocks = dsv4::allreduce_blocks(*args), lines = args->num_bytes / dsv4::kLineBytes;
  bool narrow = lines <= blocks * dsv4::kAllReduceThreads;
  auto run = narrow ? dsv4::launch<dsv4::all_reduce<1>, Dsv4AllReduceArgs>
                    : dsv4::launch<dsv4::all_reduce<dsv4::kWideLines>, Dsv4AllReduceArgs>;
  return run(dim3((unsigned)blocks), dsv4::kAllReduceThreads, 0, false, (cudaStream_t)stream, *args);
}
