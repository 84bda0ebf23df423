// Fragments of mma.m16n8k16: where things lie, and the PTX that moves and multiplies them.
//
// The weights are operand A (rows are output features), the activations operand B (columns are
// tokens). In lane l, g = l / 4 and t = l % 4:
//
//   A, 4 registers of 2 BF16          B, 2 registers of 2 BF16      C, 4 floats
//   a0 row g    k 2t,   2t+1          b0 column g  k 2t,   2t+1     c0 row g    column 2t
//   a1 row g+8  k 2t,   2t+1          b1 column g  k 2t+8, 2t+9     c1 row g    column 2t+1
//   a2 row g    k 2t+8, 2t+9                                        c2 row g+8  column 2t
//   a3 row g+8  k 2t+8, 2t+9                                        c3 row g+8  column 2t+1
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

namespace dsv4 {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockRows = 64;  // output rows of a tile: 4 row tiles of 16, one word of a lane each
constexpr int kRowTiles = 4;
constexpr int kGroupSize = 128;  // k that share one scale
constexpr int kSteps = kGroupSize / 16;
constexpr int kTileBytes = 512;  // 16 k x 64 rows of 4 bits
// A staged activation row is 128 BF16, padded by 16 bytes: the eight rows that ldmatrix reads at
// once then start 4 banks apart and touch all 32 banks once.
constexpr int kRowBytes = kGroupSize * 2 + 16;
static_assert(kRowBytes % 16 == 0 && (kRowBytes / 4) % 32 == 4,
              "ldmatrix rows must not share banks");

#define DSV4_HD __host__ __device__ __forceinline__

// ---- index arithmetic (host too, so that it can be checked without a GPU) ----

// Byte offset of a lane's 16 bytes in a tiled tensor of `groups` x 128 k and `blocks` x 64 rows.
DSV4_HD int64_t tile_offset(int expert, int group, int step, int block, int lane, int groups,
                            int blocks) {
  int64_t k16 = ((int64_t)expert * groups + group) * kSteps + step;
  return (k16 * blocks + block) * kTileBytes + lane * 16;
}

// Index of the first of a lane's eight scales; scale j is that of row lane / 4 + 8 j.
DSV4_HD int64_t scale_offset(int expert, int group, int block, int lane, int groups, int blocks) {
  return (((int64_t)expert * groups + group) * blocks + block) * kBlockRows + (lane / 4) * 8;
}

// ldmatrix.x4 reads four 8 x 8 matrices: lane l gives the address of row l % 8 (a column of B) of
// matrix l / 8 (k 8 (l / 8) .. + 7). Registers 0, 1 are then b0, b1 of the first k16 step, 2, 3 of
// the second.
DSV4_HD int b_column(int lane) { return lane % 8; }
DSV4_HD int b_offset(int lane) { return b_column(lane) * kRowBytes + (lane / 8) * 16; }

// Exchange of C fragments between warps: row tiles (half + 2 second) of 16 x 8. The odd words keep
// rows r, r + 8, r + 16, r + 24 of what a warp reads at once in different banks.
constexpr int kHalfWords = 4 * 32 + 2;
constexpr int kWarpWords = kRowTiles * kHalfWords;
DSV4_HD int exchange_index(int half, int second, int c, int lane) {
  return (2 * half + second) * kHalfWords + c * 32 + (c >> 1) + lane;
}
// The word of row 0 .. 31 and a column of tiles half (rows 0 .. 15) and half + 2 (16 .. 31).
DSV4_HD int exchange_index_of(int half, int row, int column) {
  int c = ((row / 8) % 2) * 2 + column % 2;
  return exchange_index(half, row / 16, c, (row % 8) * 4 + column / 2);
}

#if defined(__CUDACC__)
// ---- loads ----

// 16 bytes that are read once: past L1. Not `.nc`, which ptxas moves freely: it gathered all loads
// of an item behind its last mma, with little on its way until then.
__device__ __forceinline__ void load_once(uint4& v, const void* p) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
}

// cp.async.cg copies 16 bytes to shared memory through L2 only: no stale L1 line.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* p) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(p) : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

// ---- arithmetic ----

// OR-ing a code q + 8 into 0x4300 (BF16 128, whose last mantissa bit is 1) gives 136 + q exactly. The
// 136 is not taken off here but from the sums, with one more mma for all rows: -136 times the column.
// In FP32 that costs no accuracy that BF16 results show. LOP3 takes one immediate, so the second constant is kept
// in a register that the compiler does not see through.
struct Unpack {
  uint32_t mask = 0x000f000fu, magic = 0x43004300u;
  __device__ __forceinline__ Unpack() { asm volatile("" : "+r"(mask), "+r"(magic)); }

  __device__ __forceinline__ uint32_t biased(uint32_t codes) const {
    constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(v) : "r"(codes), "r"(mask), "r"(magic), "n"(kAndOr));
    return v;
  }
  // Word of a lane to its A fragment; the nibble order of w4a16.h.
  __device__ __forceinline__ void operator()(uint32_t (&a)[4], uint32_t word) const {
    a[0] = biased(word);
    a[2] = biased(word >> 4);
    a[1] = biased(word >> 8);
    a[3] = biased(word >> 12);
  }
};

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr uint32_t kMinusOffset = 0xc308c308u;  // BF16 -136, -136

// BF16 in the low or high half of a word, as float.
__device__ __forceinline__ float low_half(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

// SiLU(gate) * up under the limit. Comparisons, not fmin: a NaN must come through.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return gate / (1.0f + __expf(-gate)) * up;
}

// ---- programmatic dependent launch (sm_90 and later; nothing before) ----

// Waits until the kernel before this one has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start as soon as every block has said so. Only after
// wait_for_previous_kernel: the next kernel may then read, before its own wait, what was written
// before this kernel.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

}  // namespace dsv4
