// Loads, stores, clock of the protocols between processes: for the GPU, and for host threads.
//
// The host side is what tests/kernels/emulated_links.cpp compiles: the same protocol, two processes on
// shared memory. It keeps what the GPU promises and no more: 8 aligned bytes at a time.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define DSV4_DEVICE __device__ __forceinline__
#else
#include <time.h>
#define DSV4_DEVICE inline
#endif

namespace dsv4 {

struct alignas(16) Line {
  uint32_t word[4];
};

#ifdef __CUDACC__

// .sys: of the whole system, past L1; .relaxed: no order, which the lines do not need; .v2.u64: one
// transaction of 16 bytes to the hardware, two accesses to PTX' memory model, each of them whole. With
// .v4.u32 the model would allow payload and generation of a half to come apart.
DSV4_DEVICE void store_line(Line* to, Line v) {
  uint64_t low = (uint64_t)v.word[1] << 32 | v.word[0], high = (uint64_t)v.word[3] << 32 | v.word[2];
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high)
               : "memory");
}
DSV4_DEVICE Line load_line(const Line* from) {
  uint64_t low, high;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(low), "=l"(high)
               : "l"(from)
               : "memory");
  return Line{{(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)}};
}
DSV4_DEVICE void store_flag(uint32_t* to, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
DSV4_DEVICE uint32_t load_flag(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
// A word that kernels of this GPU alone write.
DSV4_DEVICE uint32_t load_local(const uint32_t* from) { return *(const volatile uint32_t*)from; }
template <class T>
DSV4_DEVICE void store_host(T* to, T v) {
  *(volatile T*)to = v;
}
DSV4_DEVICE void fence_system() { __threadfence_system(); }
DSV4_DEVICE uint32_t fetch_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
DSV4_DEVICE bool claim(uint32_t* p) { return atomicCAS(p, 0u, 1u) == 0; }
DSV4_DEVICE uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory");
  return t;
}
DSV4_DEVICE void rest() { __nanosleep(256); }

#else

extern bool (*before_store)(void* to, Line* line);  // of the emulation: faults; false: it is lost
extern void (*before_load)(const Line* from);       // of the emulation: counts

inline void store_line(Line* to, Line v) {
  if (before_store && !before_store(to, &v)) return;
  uint64_t half[2];
  __builtin_memcpy(half, &v, sizeof v);
  __atomic_store_n((uint64_t*)to, half[0], __ATOMIC_RELAXED);
  __atomic_store_n((uint64_t*)to + 1, half[1], __ATOMIC_RELAXED);
}
inline Line load_line(const Line* from) {
  if (before_load) before_load(from);
  uint64_t half[2] = {__atomic_load_n((const uint64_t*)from, __ATOMIC_RELAXED),
                      __atomic_load_n((const uint64_t*)from + 1, __ATOMIC_RELAXED)};
  Line v;
  __builtin_memcpy(&v, half, sizeof v);
  return v;
}
inline void store_flag(uint32_t* to, uint32_t v) {
  Line line = {{v, 0, 0, 0}};
  if (before_store && !before_store(to, &line)) return;
  __atomic_store_n(to, line.word[0], __ATOMIC_RELEASE);
}
inline uint32_t load_flag(const uint32_t* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline uint32_t load_local(const uint32_t* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }
template <class T>
inline void store_host(T* to, T v) {
  __atomic_store_n(to, v, __ATOMIC_RELAXED);
}
inline void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint32_t fetch_add(uint32_t* p, uint32_t v) {
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline bool claim(uint32_t* p) {
  uint32_t zero = 0;
  return __atomic_compare_exchange_n(p, &zero, 1u, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
inline void rest() {
  timespec t = {0, 20000};
  nanosleep(&t, nullptr);
}

#endif

}  // namespace dsv4
