// What the two ways through an MoE layer have in common.
#pragma once
#include "launch.cuh"
#include "stream.cuh"
#include "w4a16.h"

namespace dsv4 {

constexpr int kMaxTopK = 16;
constexpr int kMaxExperts = 1024;
constexpr int kDecodeTokens = 8;  // columns of one mma; more tokens are sorted by expert

struct Moe {
  const __nv_bfloat16* hidden;
  const int32_t* topk_ids;
  const float* topk_weights;
  __nv_bfloat16* out;
  Tiled w13, w2;
  int num_tokens, top_k, num_experts, hidden_size, inter_size;
  float limit;
};

inline Moe make_moe(const Dsv4MoeArgs& a) {
  Moe m = {};
  m.hidden = (const __nv_bfloat16*)a.hidden;
  m.topk_ids = a.topk_ids;
  m.topk_weights = a.topk_weights;
  m.out = (__nv_bfloat16*)a.out;
  m.w13 = {(const uint8_t*)a.w13, (const __nv_bfloat16*)a.w13_scale, a.hidden_size / kGroupSize,
           2 * a.inter_size / kBlockRows};
  m.w2 = {(const uint8_t*)a.w2, (const __nv_bfloat16*)a.w2_scale, a.inter_size / kGroupSize,
          a.hidden_size / kBlockRows};
  m.num_tokens = a.num_tokens;
  m.top_k = a.top_k;
  m.num_experts = a.num_experts;
  m.hidden_size = a.hidden_size;
  m.inter_size = a.inter_size;
  m.limit = a.swiglu_limit;
  return m;
}

// Ends gate + up: sums over warps, SwiGLU, BF16 to row act_row(column) of act (-1: no such column).
// Row tiles 0, 1 of the block are gate rows, 2, 3 the up rows of the same features.
template <int kTiles, class ActRow>
__device__ __forceinline__ void write_act(__nv_bfloat16* act, const Moe& moe, int block,
                                          const float (&total)[kTiles][kRowTiles][4],
                                          const Exchange<kTiles>& exchange, ActRow act_row) {
  const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    int row = act_row(8 * n + warp);
    const Sums sums = exchange(total[n]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v = sums.tile[h];
      float up = __shfl_down_sync(~0u, v, 16);
      if (row >= 0 && lane < 16)
        act[(int64_t)row * moe.inter_size + block * 32 + 16 * h + lane] =
            __float2bfloat16(swiglu(v, up, moe.limit));
    }
  }
}

size_t decode_workspace_bytes(const Moe& moe);
size_t grouped_workspace_bytes(const Moe& moe);
cudaError_t run_decode(const Moe& moe, void* workspace, cudaStream_t stream);
cudaError_t run_grouped(const Moe& moe, void* workspace, cudaStream_t stream);

}  // namespace dsv4
