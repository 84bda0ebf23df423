// SiLU(gate) * up over rows with features interleaved by 32, as a Marlin GEMM over w13 leaves them.
//
//   in   [ gate 0..31 | up 0..31 | gate 32..63 | up 32..63 | ... ]
//   out  [ 0..31      | 32..63     | ... ]          a thread: 8 features, 16 bytes of each
#include "fragment.cuh"
#include "launch.cuh"
#include "w4a16.h"

namespace dsv4 {
namespace {

struct Silu {
  const uint4* in;
  uint4* out;
  int64_t count;  // of 8 features
  float limit;
};

__device__ __forceinline__ uint32_t swiglu_pair(uint32_t gate, uint32_t up, float limit) {
  __nv_bfloat162 v = __floats2bfloat162_rn(swiglu(low_half(gate), low_half(up), limit),
                                           swiglu(high_half(gate), high_half(up), limit));
  return *(uint32_t*)&v;
}

// inter_size is a multiple of 32, so blocks of 4 threads go on across rows as if they were one.
__global__ void __launch_bounds__(kThreads) silu_interleaved(const __grid_constant__ Silu args) {
  int64_t step = (int64_t)gridDim.x * kThreads;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < args.count; i += step) {
    int64_t at = i / 4 * 8 + i % 4;
    uint4 gate = args.in[at], up = args.in[at + 4];
    args.out[i] =
        make_uint4(swiglu_pair(gate.x, up.x, args.limit), swiglu_pair(gate.y, up.y, args.limit),
                   swiglu_pair(gate.z, up.z, args.limit), swiglu_pair(gate.w, up.w, args.limit));
  }
}

}  // namespace
}  // namespace dsv4

extern "C" int dsv4_silu_interleaved(const void* in, void* out, int32_t num_rows,
                                     int32_t inter_size, float swiglu_limit, void* stream) {
  if (num_rows < 0 || inter_size <= 0 || inter_size % 32 != 0) return cudaErrorInvalidValue;
  if (num_rows == 0) return cudaSuccess;
  dsv4::Silu args = {(const uint4*)in, (uint4*)out, (int64_t)num_rows * (inter_size / 8),
                     swiglu_limit};
  int64_t blocks = (args.count + dsv4::kThreads - 1) / dsv4::kThreads;
  constexpr int64_t kMaxBlocks = 1 << 20;
  return dsv4::launch<dsv4::silu_interleaved>(
      dim3((unsigned)(blocks < kMaxBlocks ? blocks : kMaxBlocks)), dsv4::kThreads, 0, false,
      (cudaStream_t)stream, args);
}
