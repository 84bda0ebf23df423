// The all-reduce as one thread runs it: push its lines to every peer, wait for theirs, add, store.
//
//   inbox of rank r   slot 0 [ lines from source 0 | source 1 | ... ]   without r itself
//                     slot 1 [ ... ]                                    slot = generation % 2
//   thread t of T     lines t, t + T, t + 2 T, ... of every source; a line is 8 bytes of payload
//
// Why two slots suffice: a rank writes generation g + 2 into a slot after its call g + 1 has ended,
// so after it has received g + 1 from every peer, which sent it after its own call g had ended, so
// after it had read all of g from that slot.
//
// Why a wrap does no harm: a line left by an old, longer message would match again after 2^32 calls
// (three days at full speed). Every 32nd generation and the one after it clear one window of 32 lines
// behind the end of their own message; no peer writes there before this call has ended, as above. So
// no line outlives 32 * windows generations, at most 65536. Zero is no generation.
#pragma once
#include "allreduce.h"
#include "allreduce_memory.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace dsv4 {

constexpr uint32_t kOperationAllReduce = 1;
constexpr int kLineBytes = 8;    // of payload
constexpr int kWindowLines = 32;  // cleared at a time
constexpr uint32_t kHashStart = 0x811c9dc5u, kHashFactor = 0x01000193u;  // FNV-1a's, on words
constexpr uint32_t kPollsPerLook = 64;    // polls between two looks at the clock
constexpr uint32_t kPollsAtSpeed = 4096;  // then with a rest at each look: it may take long

DSV4_DEVICE uint32_t next_generation(uint32_t g) { return g == 0xffffffffu ? 2 : g + 1; }

DSV4_DEVICE Line* lines_of(const Dsv4AllReduceArgs& a, int reader, int source, uint32_t generation) {
  int index = source < reader ? source : source - 1;
  int part = (int)(generation & 1) * (a.world_size - 1) + index;
  return (Line*)a.inbox[reader] + (size_t)part * (a.max_bytes / kLineBytes);
}

struct Payload {
  uint32_t word[2];
};

DSV4_DEVICE Payload own_payload(const Dsv4AllReduceArgs& a, int line) {
  Payload p;
#ifdef __CUDACC__
  uint2 v = ((const uint2*)a.in)[line];
  p.word[0] = v.x;
  p.word[1] = v.y;
#else
  __builtin_memcpy(&p, (const char*)a.in + (size_t)line * kLineBytes, sizeof p);
#endif
  return p;
}

DSV4_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
#endif
}

// Two floats to BF16, to nearest even; a NaN becomes 0x7fff.
DSV4_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *(uint32_t*)&v;
#else
  uint32_t out = 0;
  const float both[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &both[i], sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out |= (both[i] == both[i] ? rounded : 0x7fffu) << (16 * i);
  }
  return out;
#endif
}

struct Sum {
  float value[4];
};

DSV4_DEVICE void add(Sum& sum, uint32_t word0, uint32_t word1, bool first) {
  float v[4] = {float_of(word0 << 16), float_of(word0 & 0xffff0000u), float_of(word1 << 16),
                float_of(word1 & 0xffff0000u)};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) sum.value[i] = first ? v[i] : sum.value[i] + v[i];
}

// Mixed into `hash`, which depends on the order: that of a thread's lines is the same on all ranks.
DSV4_DEVICE void store_sum(const Dsv4AllReduceArgs& a, int line, const Sum& sum, uint32_t& hash) {
  uint32_t low = pack_bf16(sum.value[0], sum.value[1]);
  uint32_t high = pack_bf16(sum.value[2], sum.value[3]);
  hash = (hash ^ low) * kHashFactor;
  hash = (hash ^ high) * kHashFactor;
#ifdef __CUDACC__
  ((uint2*)a.out)[line] = make_uint2(low, high);
#else
  uint32_t both[2] = {low, high};
  __builtin_memcpy((char*)a.out + (size_t)line * kLineBytes, both, sizeof both);
#endif
}

// ---- the steps of a thread: lines first, first + step, ... ----

DSV4_DEVICE void push(const Dsv4AllReduceArgs& a, uint32_t generation, int first, int step) {
  int lines = a.num_bytes / kLineBytes;
  for (int i = first; i < lines; i += step) {
    Payload p = own_payload(a, i);
    Line line = {{p.word[0], generation, p.word[1], generation}};
    for (int reader = 0; reader < a.world_size; ++reader)
      if (reader != a.rank) store_line(lines_of(a, reader, a.rank, generation) + i, line);
  }
}

// `index` 0 .. kWindowLines - 1 clears a line of the window, if it is the turn of one. True if it did:
// fence_system before the call ends.
DSV4_DEVICE bool clear_old(const Dsv4AllReduceArgs& a, uint32_t generation, int index) {
  if ((generation >> 1 & 15) != 0) return false;
  uint32_t windows = (uint32_t)(a.max_bytes / kLineBytes / kWindowLines);
  int line = (int)((generation >> 5) % windows) * kWindowLines + index;
  if (line < a.num_bytes / kLineBytes) return false;
  for (int source = 0; source < a.world_size; ++source)
    if (source != a.rank) store_line(lines_of(a, a.rank, source, generation) + line, Line{});
  return true;
}

DSV4_DEVICE void give_up(const Dsv4AllReduceArgs& a, uint32_t generation, int source, int block,
                         int index, const Line& seen, uint64_t waited_ns) {
  if (!claim(&a.state->aborted)) return;  // another thread has written the record
  Dsv4WaitRecord* r = &a.control->record;
  store_host(&r->rank, (uint32_t)a.rank);
  store_host(&r->source, (uint32_t)source);
  store_host(&r->operation, kOperationAllReduce);
  store_host(&r->generation, generation);
  store_host(&r->expected, generation);
  store_host(&r->seen[0], seen.word[1]);
  store_host(&r->seen[1], seen.word[3]);
  store_host(&r->block, (uint32_t)block);
  store_host(&r->line, (uint32_t)index);
  store_host(&r->num_bytes, (uint32_t)a.num_bytes);
  store_host(&r->waited_ns, waited_ns);
  fence_system();
  store_host(&r->written, 1u);
  fence_system();
}

// Waits for kWide lines at once, at first, first + step, ...; none is loaded beyond the last one, nor
// any in its place: thousands of threads that poll one line of host memory wait for each other.
// False: the deadline passed, here or elsewhere in this call.
template <int kWide>
DSV4_DEVICE bool await_lines(const Dsv4AllReduceArgs& a, uint32_t generation, int source, int block,
                             int first, int step, int lines, Line (&got)[kWide]) {
  const Line* from = lines_of(a, a.rank, source, generation);
  uint64_t start = 0;
  for (uint32_t polls = 1;; ++polls) {
    bool ready = true;
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = 0; j < kWide; ++j) {
      int i = first + j * step;
      got[j] = i < lines ? load_line(from + i) : Line{{0, generation, 0, generation}};
    }
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = 0; j < kWide; ++j)
      ready = ready && got[j].word[1] == generation && got[j].word[3] == generation;
    if (ready) return true;
    if (polls % kPollsPerLook != 0) continue;
    if (load_local(&a.state->aborted)) return false;
    uint64_t now = now_ns();
    if (start == 0) start = now;
    if (now - start >= (uint64_t)a.deadline_ns) {
      Line missing = got[0];
      int at = first;
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int j = kWide - 1; j >= 0; --j) {
        if (got[j].word[1] == generation && got[j].word[3] == generation) continue;
        missing = got[j];
        at = first + j * step;
      }
      give_up(a, generation, source, block, at, missing, now - start);
      return false;
    }
    if (polls >= kPollsAtSpeed) rest();
  }
}

template <int kWide>
DSV4_DEVICE bool collect(const Dsv4AllReduceArgs& a, uint32_t generation, int block, int first,
                         int step, uint32_t& hash) {
  int lines = a.num_bytes / kLineBytes;
  for (int base = first; base < lines; base += kWide * step) {
    Sum sum[kWide];
    for (int source = 0; source < a.world_size; ++source) {  // one order on all ranks
      Line got[kWide];
      if (source != a.rank &&
          !await_lines<kWide>(a, generation, source, block, base, step, lines, got))
        return false;
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int j = 0; j < kWide; ++j) {
        if (base + j * step >= lines) continue;
        if (source == a.rank) {
          Payload own = own_payload(a, base + j * step);
          add(sum[j], own.word[0], own.word[1], source == 0);
        } else {
          add(sum[j], got[j].word[0], got[j].word[2], source == 0);
        }
      }
    }
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = 0; j < kWide; ++j)
      if (base + j * step < lines) store_sum(a, base + j * step, sum[j], hash);
  }
  return true;
}

DSV4_DEVICE bool is_hashed(const Dsv4AllReduceArgs& a, uint32_t generation) {
  return a.hash_every > 0 && generation % (uint32_t)a.hash_every == 0;
}

// Adds a thread's part, if this call is one of those. True if it did: fence_system before `finish`.
DSV4_DEVICE bool add_hash(const Dsv4AllReduceArgs& a, uint32_t generation, int first, uint32_t hash) {
  if (!is_hashed(a, generation)) return false;
  fetch_add(&a.state->hash, hash * (2 * (uint32_t)first + 1));  // odd: no part is lost
  return true;
}

// Once per block, after all its threads have collected; the last block opens the next generation. All
// blocks have read this one by then.
DSV4_DEVICE void finish(const Dsv4AllReduceArgs& a, uint32_t generation, int num_blocks) {
  if (fetch_add(&a.state->arrived, 1) != (uint32_t)num_blocks - 1) return;
  if (is_hashed(a, generation)) {
    uint64_t entry = (uint64_t)load_local(&a.state->hash) << 32 | generation;
    store_host(&a.control->hash[generation / (uint32_t)a.hash_every % DSV4_HASH_ENTRIES], entry);
    a.state->hash = 0;
  }
  a.state->arrived = 0;
  a.state->generation = next_generation(generation);
  store_host(&a.control->completed, generation);
}

// ---- host: what is supported, how many blocks ----

constexpr int kAllReduceThreads = 256;
constexpr int kMaxBlocks = 16;
constexpr int kWideLines = 4;  // 16 bytes each in flight per thread, where there are so many

inline bool allreduce_is_supported(int32_t world_size, int32_t max_bytes) {
  return world_size >= 2 && world_size <= DSV4_MAX_RANKS && max_bytes > 0 &&
         max_bytes <= DSV4_ALLREDUCE_MAX_BYTES && max_bytes % (kLineBytes * kWindowLines) == 0;
}

inline bool allreduce_is_supported(const Dsv4AllReduceArgs& a) {
  return allreduce_is_supported(a.world_size, a.max_bytes) && a.rank >= 0 &&
         a.rank < a.world_size && a.num_bytes >= 0 && a.num_bytes <= a.max_bytes &&
         a.num_bytes % 16 == 0 && a.deadline_ns > 0 && a.num_blocks >= 0 && a.num_blocks <= 64 &&
         a.hash_every >= 0;
}

inline int allreduce_blocks(const Dsv4AllReduceArgs& a) {
  if (a.num_blocks) return a.num_blocks;
  int blocks = (a.num_bytes / kLineBytes + kAllReduceThreads - 1) / kAllReduceThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

inline size_t allreduce_inbox_bytes(int32_t world_size, int32_t max_bytes) {
  if (!allreduce_is_supported(world_size, max_bytes)) return 0;
  return (size_t)2 * (world_size - 1) * (max_bytes / kLineBytes) * sizeof(Line);
}

}  // namespace dsv4
