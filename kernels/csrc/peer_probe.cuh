// The probe as one block runs it; `Group` is the block: its threads, and what they agree on.
//
//   initiator   data r -> flag r            check data r, data r+1 -> flag r+1
//   the other           check data r, data r -> flag r
//
// Unlike the all-reduce, data carries no generation and is trusted because the flag came: what stores
// that pass each other, or are lost, get wrong here. That is what other tiers rely on.
#pragma once
#include "allreduce.h"
#include "allreduce_memory.cuh"

namespace dsv4 {

constexpr int kProbeThreads = 512;

DSV4_DEVICE uint32_t mix(uint32_t x) {  // a bijection of 32 bits (Wellons' lowbias32)
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Every word differs from its neighbours, from round to round and between directions.
DSV4_DEVICE Line pattern(uint32_t initiator, uint32_t round, uint32_t line) {
  uint32_t seed = mix(round * 2 + initiator) + line * 4;
  return Line{{mix(seed), mix(seed + 1), mix(seed + 2), mix(seed + 3)}};
}

DSV4_DEVICE uint32_t* probe_flag(void* flags, int block) {
  return (uint32_t*)((char*)flags + (size_t)block * DSV4_PROBE_FLAG_STRIDE);
}

template <class Group>
DSV4_DEVICE void probe_send(const Dsv4ProbeArgs& a, Group& group, uint32_t round) {
  int base = group.block * a.send_lines;
  for (int i = group.thread; i < a.send_lines; i += group.num_threads)
    store_line((Line*)a.write_data + base + i, pattern((uint32_t)a.initiator, round, base + i));
  if (a.send_lines) fence_system();
  group.all(true);
  if (group.thread == 0) store_flag(probe_flag(a.peer_flags, group.block), round);
}

// False: the flag did not come in time; `seen` is then what it was.
DSV4_DEVICE bool probe_await(const Dsv4ProbeArgs& a, int block, uint32_t round, uint32_t* seen) {
  const uint32_t* flag = probe_flag(a.my_flags, block);
  uint64_t start = 0;
  for (uint32_t polls = 1;; ++polls) {
    *seen = load_flag(flag);
    if (*seen == round) return true;
    if (polls % 64 != 0) continue;
    uint64_t now = now_ns();
    if (start == 0) start = now;
    if (now - start >= (uint64_t)a.deadline_ns) return false;
    if (polls >= 65536) rest();
  }
}

template <class Group>
DSV4_DEVICE bool probe_receive(const Dsv4ProbeArgs& a, Group& group, uint32_t round,
                               uint32_t* wrong) {
  Dsv4ProbeResult* result = &a.results[group.block];
  uint32_t seen = 0;
  bool came = group.thread != 0 || probe_await(a, group.block, round, &seen);
  if (!came) store_host(&result->flag_seen, seen);
  if (!group.all(came)) return false;
  int base = group.block * a.check_lines;
  bool bad = false;
  for (int i = group.thread; i < a.check_lines; i += group.num_threads) {
    Line want = pattern(1u - (uint32_t)a.initiator, round, base + i);
    Line got = load_line((const Line*)a.read_data + base + i);
    bool same = got.word[0] == want.word[0] && got.word[1] == want.word[1] &&
                got.word[2] == want.word[2] && got.word[3] == want.word[3];
    if (same) continue;
    bad = true;
    if (!group.claim_first()) continue;
    store_host(&result->wrong_round, round);
    store_host(&result->wrong_line, (uint32_t)(base + i));
    for (int w = 0; w < 4; ++w) {
      store_host(&result->expected[w], want.word[w]);
      store_host(&result->seen[w], got.word[w]);
    }
  }
  *wrong += group.count(bad);  // and a barrier: the answer allows the other to overwrite the data
  return true;
}

template <class Group>
DSV4_DEVICE void probe_block(const Dsv4ProbeArgs& a, Group& group) {
  Dsv4ProbeResult* result = &a.results[group.block];
  uint32_t wrong = 0, round = 1, last = (uint32_t)(a.untimed_rounds + a.rounds);
  uint64_t start = now_ns();
  bool good = true;
  for (; good && round <= last; ++round) {
    if ((int)round == a.untimed_rounds + 1) start = now_ns();
    if (a.initiator) probe_send(a, group, round);
    good = probe_receive(a, group, round, &wrong);
    if (good && !a.initiator) probe_send(a, group, round);
  }
  if (group.thread != 0) return;
  store_host(&result->elapsed_ns, now_ns() - start);
  store_host(&result->rounds, good ? last : round - 2);
  store_host(&result->wrong, wrong);
  fence_system();
  store_host(&result->status, good ? 1u : 2u);
}

inline bool probe_is_supported(const Dsv4ProbeArgs& a) {
  return a.num_blocks >= 1 && a.num_blocks <= 64 && a.send_lines >= 0 && a.check_lines >= 0 &&
         a.send_lines <= 1 << 20 && a.check_lines <= 1 << 20 && a.rounds >= 1 &&
         a.untimed_rounds >= 0 && (int64_t)a.rounds + a.untimed_rounds <= 1 << 30 &&
         a.deadline_ns > 0 && (a.initiator == 0 || a.initiator == 1);
}

}  // namespace dsv4
