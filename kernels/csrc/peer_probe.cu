// The probe kernel; its steps are in peer_probe.cuh.
#include <cuda_runtime.h>

#include "allreduce.h"
#include "launch.cuh"
#include "peer_probe.cuh"

namespace dsv4 {
namespace {

struct Block {
  int block, thread, num_threads;
  uint32_t* first;  // shared, zero
  __device__ bool all(bool v) { return __syncthreads_and(v); }
  __device__ uint32_t count(bool v) { return (uint32_t)__syncthreads_count(v); }
  __device__ bool claim_first() { return atomicCAS(first, 0u, 1u) == 0; }
};

__global__ void __launch_bounds__(kProbeThreads) peer_probe(
    const __grid_constant__ Dsv4ProbeArgs args) {
  __shared__ uint32_t first;
  if (threadIdx.x == 0) first = 0;
  __syncthreads();
  Block block = {(int)blockIdx.x, (int)threadIdx.x, kProbeThreads, &first};
  probe_block(args, block);
}

}  // namespace
}  // namespace dsv4

extern "C" int dsv4_probe(const Dsv4ProbeArgs* args, void* stream) {
  if (!dsv4::probe_is_supported(*args)) return cudaErrorInvalidValue;
  return dsv4::launch<dsv4::peer_probe>(dim3((unsigned)args->num_blocks), dsv4::kProbeThreads, 0,
                                        false, (cudaStream_t)stream, *args);
}
