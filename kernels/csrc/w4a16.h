// C ABI of the W4A16 kernels: INT4 weights, symmetric, group 128, BF16 scales and activations.
//
// Plain pointers, sizes and a CUDA stream; no torch. Every function returns a cudaError_t as int
// (0 is success) and launches without synchronizing, so that all of them can be captured in a graph.
// The caller (kernels/ops.py) has checked its arguments; these functions only refuse what they
// cannot launch.
//
// Weights are in the layout that Marlin reads ("tiled" below), so that one copy serves both:
//
//   tile   16 (k) x 64 (n), 512 bytes: lane l of a warp owns bytes 16 l .. 16 l + 15
//   word w of a lane (w = 0..3) is the A fragment of mma.m16n8k16 for output rows 16 w .. 16 w + 15:
//     with g = l / 4 and t = l % 4, nibbles 0 and 4 are (row g, k 2t, 2t+1), 1 and 5 are
//     (row g, k 2t+8, 2t+9), 2 and 6 are (row g+8, k 2t, 2t+1), 3 and 7 are (row g+8, k 2t+8, 2t+9)
//   tensor [expert][k / 16][n / 64][512 bytes]; a code is q + 8
//   scales [expert][k / 128][n] BF16; within each block of 64 rows, position 8 i + j holds row i + 8 j,
//     so that one 16-byte load gives a lane its eight scales
//
// The rows of w13 are interleaved by 32: block b of 64 rows holds gate rows 32 b .. 32 b + 31, then up
// rows 32 b .. 32 b + 31, so that one block computes SiLU(gate) * up without another.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const void* hidden;         // BF16 [num_tokens][hidden_size]
  const int32_t* topk_ids;    // [num_tokens][top_k]; -1 (or any id outside) is skipped
  const float* topk_weights;  // [num_tokens][top_k]
  const void* w13;            // tiled, k = hidden_size, n = 2 * inter_size, rows interleaved by 32
  const void* w13_scale;      // BF16
  const void* w2;             // tiled, k = inter_size, n = hidden_size
  const void* w2_scale;       // BF16
  void* out;                  // BF16 [num_tokens][hidden_size]; every element is written
  void* workspace;            // dsv4_moe_workspace_bytes of it, 256-byte aligned; need not be zero
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t hidden_size;        // multiple of 128
  int32_t inter_size;         // multiple of 128
  float swiglu_limit;         // gate <= limit, |up| <= limit; infinity for none
} Dsv4MoeArgs;

// Bytes of workspace for at most this many tokens (0 where the sizes are not supported).
size_t dsv4_moe_workspace_bytes(int32_t num_tokens, int32_t top_k, int32_t num_experts,
                                int32_t hidden_size, int32_t inter_size);

// out[t] = sum over slots s of weight[t][s] * W2_e (silu(min(W1_e x, limit)) * clamp(W3_e x, limit)).
int dsv4_moe(const Dsv4MoeArgs* args, void* stream);

typedef struct {
  const void* a;        // BF16 [size_m][size_k]
  const void* weight;   // tiled, one "expert"
  const void* scale;    // BF16
  void* out;            // BF16 [size_m][size_n]
  void* workspace;      // dsv4_gemm_workspace_bytes of it; need not be zero
  int32_t size_m;
  int32_t size_n;       // multiple of 64
  int32_t size_k;       // multiple of 128
} Dsv4GemmArgs;

size_t dsv4_gemm_workspace_bytes(int32_t size_m, int32_t size_n, int32_t size_k);
int dsv4_gemm(const Dsv4GemmArgs* args, void* stream);

// out[r][i] = silu(min(gate, limit)) * clamp(up, limit) of rows interleaved by 32 (what a Marlin GEMM
// over our w13 gives): in BF16 [num_rows][2 * inter_size], out BF16 [num_rows][inter_size].
int dsv4_silu_interleaved(const void* in, void* out, int32_t num_rows, int32_t inter_size,
                          float swiglu_limit, void* stream);

const char* dsv4_error_string(int error);

#ifdef __cplusplus
}
#endif
