// The functions of allreduce.h without a GPU: the protocols' own sources, run by host threads.
//
// Device memory is a memfd, an IPC handle its path in /proc, so that a peer process can map it as it
// would a GPU's. The environment variable EMULATED_FAULT breaks stores into such mappings only:
//   lose:N      the N-th and all later ones are lost     corrupt:N  a bit of the N-th is flipped
//   slow:US     each waits                               stuck:N    the N-th never returns
//   skip:N      the N-th alone is lost                no-ipc     no handle can be opened
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "allreduce_protocol.cuh"
#include "peer_probe.cuh"

namespace {

constexpr int kMapping = 205, kInvalid = 1;  // cudaErrorMapBufferObjectFailed, cudaErrorInvalidValue
constexpr int kThreads = 3;                  // of an all-reduce

std::map<char*, std::pair<int, size_t>> mapped;  // file, bytes
char *peer_begin = nullptr, *peer_end = nullptr;
std::atomic<long> stores{0}, loads{0};
std::string fault;
long fault_argument = 0;

bool faulty_store(void* to, dsv4::Line* line) {
  if ((char*)to < peer_begin || (char*)to >= peer_end) return true;
  long number = ++stores;
  if (fault == "lose") return number < fault_argument;
  if (fault == "skip") return number != fault_argument;
  if (fault == "corrupt" && number == fault_argument) line->word[0] ^= 0x100;
  if (fault == "slow") usleep((useconds_t)fault_argument);
  if (fault == "stuck" && number >= fault_argument)
    for (;;) pause();
  return true;
}

struct Start {
  Start() {
    const char* text = std::getenv("EMULATED_FAULT");
    if (!text) return;
    fault = text;
    size_t colon = fault.find(':');
    if (colon != std::string::npos) {
      fault_argument = std::atol(fault.c_str() + colon + 1);
      fault.resize(colon);
    }
    dsv4::before_store = faulty_store;
  }
} start;

char* map_file(int file, size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return p == MAP_FAILED ? nullptr : (char*)p;
}

}  // namespace

namespace dsv4 {
bool (*before_store)(void*, Line*) = nullptr;
void (*before_load)(const Line*) = [](const Line*) { ++loads; };
}  // namespace dsv4

extern "C" {

const char* dsv4_error_string(int error) {
  static char text[32];
  std::snprintf(text, sizeof text, "emulated error %d", error);
  return text;
}

size_t dsv4_allreduce_inbox_bytes(int32_t world_size, int32_t max_bytes) {
  return dsv4::allreduce_inbox_bytes(world_size, max_bytes);
}

int dsv4_allreduce(const Dsv4AllReduceArgs* args, void*) {
  const Dsv4AllReduceArgs& a = *args;
  if (!dsv4::allreduce_is_supported(a)) return kInvalid;
  if (a.num_bytes == 0 || dsv4::load_local(&a.state->aborted)) return 0;
  uint32_t generation = a.state->generation;
  std::vector<std::thread> threads;
  for (int block = 0; block < kThreads; ++block)  // of one thread each
    threads.emplace_back([&a, block, generation] {
      dsv4::push(a, generation, block, kThreads);
      bool cleared = false;
      for (int i = 0; block == 0 && i < dsv4::kWindowLines; ++i)
        cleared |= dsv4::clear_old(a, generation, i);
      bool narrow = a.num_bytes / dsv4::kLineBytes <= 4 * kThreads;  // so that both are run
      uint32_t hash = dsv4::kHashStart;
      bool good = narrow
                      ? dsv4::collect<1>(a, generation, block, block, kThreads, hash)
                      : dsv4::collect<dsv4::kWideLines>(a, generation, block, block, kThreads, hash);
      if (dsv4::add_hash(a, generation, block, hash) || cleared) dsv4::fence_system();
      if (good) dsv4::finish(a, generation, kThreads);
    });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// For tests of host code and arithmetic.
long emulated_loads() { return loads; }
int emulated_blocks(const Dsv4AllReduceArgs* args) { return dsv4::allreduce_blocks(*args); }
uint32_t emulated_next_generation(uint32_t g) { return dsv4::next_generation(g); }
void emulated_round(const float* in, uint32_t* out, int pairs) {
  for (int i = 0; i < pairs; ++i) out[i] = dsv4::pack_bf16(in[2 * i], in[2 * i + 1]);
}

int dsv4_probe(const Dsv4ProbeArgs* args, void*) {
  if (!dsv4::probe_is_supported(*args)) return kInvalid;
  struct Alone {
    int block, thread, num_threads;
    bool claimed;
    bool all(bool v) { return v; }
    uint32_t count(bool v) { return v; }
    bool claim_first() { return claimed ? false : (claimed = true); }
  };
  std::vector<std::thread> threads;
  for (int block = 0; block < args->num_blocks; ++block)
    threads.emplace_back([args, block] {
      Alone group = {block, 0, 1, false};
      dsv4::probe_block(*args, group);
    });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int dsv4_device_count(int32_t* count) {
  *count = 2;
  return 0;
}
int dsv4_set_device(int32_t device) { return device < 2 ? 0 : 101; }
int dsv4_device_bus_id(int32_t device, char* text, int32_t size) {
  std::snprintf(text, (size_t)size, "0000:0%d:00.0", device + 1);
  return 0;
}
int dsv4_synchronize() { return 0; }
int dsv4_host_register(void* pointer, size_t, void** device_pointer) {
  *device_pointer = pointer;
  return 0;
}
int dsv4_host_unregister(void*) { return 0; }

int dsv4_device_alloc(size_t bytes, void** pointer) {
  int file = memfd_create("emulated", 0);
  if (file < 0 || ftruncate(file, (off_t)bytes)) return 2;
  *pointer = map_file(file, bytes);
  if (!*pointer) return 2;
  mapped[(char*)*pointer] = {file, bytes};
  return 0;
}
int dsv4_device_free(void* pointer) {
  auto found = mapped.find((char*)pointer);
  if (found == mapped.end()) return kInvalid;
  munmap(pointer, found->second.second);
  close(found->second.first);
  mapped.erase(found);
  return 0;
}
int dsv4_device_write(void* pointer, const void* from, size_t bytes) {
  std::memcpy(pointer, from, bytes);
  return 0;
}
int dsv4_device_read(void* to, const void* pointer, size_t bytes) {
  std::memcpy(to, pointer, bytes);
  return 0;
}
int dsv4_ipc_export(void* pointer, void* handle) {
  auto found = mapped.find((char*)pointer);
  if (found == mapped.end()) return kInvalid;
  std::memset(handle, 0, DSV4_IPC_HANDLE_BYTES);
  std::snprintf((char*)handle, DSV4_IPC_HANDLE_BYTES, "/proc/%d/fd/%d", (int)getpid(),
                found->second.first);
  return 0;
}
int dsv4_ipc_open(const void* handle, void** pointer) {
  if (fault == "no-ipc") return kMapping;
  int file = open((const char*)handle, O_RDWR);
  if (file < 0) return kMapping;
  off_t bytes = lseek(file, 0, SEEK_END);
  char* p = map_file(file, (size_t)bytes);
  if (!p) return kMapping;
  mapped[p] = {file, (size_t)bytes};
  peer_begin = p;
  peer_end = p + bytes;
  *pointer = p;
  return 0;
}
int dsv4_ipc_close(void* pointer) { return dsv4_device_free(pointer); }

}  // extern "C"
