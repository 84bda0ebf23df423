// Runs the host code of the kernels without a GPU: a CUDA runtime that only writes down launches.
//
// Linked with the library's own objects in place of libcudart. It answers what host code asks of a
// device (multiprocessors and compute capability are arguments), refuses what that device would
// refuse of a launch, and prints each launch as a line of JSON, for kernels/dry_run.py. A function
// of the runtime that is not here does not link: add it.
#include <cuda_runtime_api.h>

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "csrc/allreduce.h"
#include "csrc/w4a16.h"

namespace {

int multiprocessors = 0, major = 0, minor = 0, optin_bytes = 0;
constexpr int kDefaultSharedBytes = 48 * 1024;

std::map<const void*, std::string> names;       // host function to mangled name
std::map<const void*, int> allowed_shared;      // by cudaFuncSetAttribute
std::string running;                            // the case
cudaError_t sticky = cudaSuccess;

struct Call {
  dim3 grid, block;
  size_t shared;
};
Call pushed;

cudaError_t fail(cudaError_t error) { return sticky = error; }

cudaError_t record(const void* function, dim3 grid, dim3 block, size_t shared, bool dependent) {
  auto name = names.find(function);
  if (name == names.end()) return fail(cudaErrorInvalidDeviceFunction);
  auto allowed = allowed_shared.find(function);
  size_t most = allowed == allowed_shared.end() ? kDefaultSharedBytes : (size_t)allowed->second;
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0;
  if (empty || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    return fail(cudaErrorInvalidConfiguration);
  if (shared > most) return fail(cudaErrorInvalidValue);
  std::printf("{\"case\": \"%s\", \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %" PRIu64
              ", \"dynamic_shared_bytes\": %zu, \"dependent\": %s}\n",
              running.c_str(), name->second.c_str(), grid.x, grid.y, grid.z, threads, shared,
              dependent ? "true" : "false");
  return cudaSuccess;
}

}  // namespace

extern "C" {

// ---- what nvcc's stubs call ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  pushed = {grid, block, shared};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void**)stream = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                               cudaStream_t) {
  return record((const void*)kernel, grid, block, shared, false);
}

// ---- what host code calls ----

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = optin_bytes; return cudaSuccess;
    default: return fail(cudaErrorInvalidValue);
  }
}
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                           int value) {
  if (!names.count(function)) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > optin_bytes) return fail(cudaErrorInvalidValue);
    allowed_shared[function] = value;
  }
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**,
                                       size_t shared, cudaStream_t) {
  return record(function, grid, block, shared, false);
}
cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                          void**) {
  bool dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      dependent = config->attrs[i].val.programmaticStreamSerializationAllowed;
  return record(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, dependent);
}
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
// What memory of two processes needs; no case calls it, but it links.
cudaError_t CUDARTAPI cudaSetDevice(int) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaGetDeviceCount(int*) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaDeviceGetPCIBusId(char*, int, int) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaDeviceSynchronize() { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaHostRegister(void*, size_t, unsigned) {
  return fail(cudaErrorNotSupported);
}
cudaError_t CUDARTAPI cudaHostUnregister(void*) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaHostGetDevicePointer(void**, void*, unsigned) {
  return fail(cudaErrorNotSupported);
}
cudaError_t CUDARTAPI cudaMalloc(void**, size_t) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaFree(void*) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaMemset(void*, int, size_t) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind) {
  return fail(cudaErrorNotSupported);
}
cudaError_t CUDARTAPI cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) {
  return fail(cudaErrorNotSupported);
}
cudaError_t CUDARTAPI cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return fail(cudaErrorNotSupported);
}
cudaError_t CUDARTAPI cudaIpcCloseMemHandle(void*) { return fail(cudaErrorNotSupported); }
cudaError_t CUDARTAPI cudaGetLastError() {
  cudaError_t error = sticky;
  sticky = cudaSuccess;
  return error;
}
cudaError_t CUDARTAPI cudaPeekAtLastError() { return sticky; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  static char text[32];
  std::snprintf(text, sizeof text, "cudaError_t %d", (int)error);
  return text;
}

}  // extern "C"

namespace {

// Host code passes pointers on and must not read through them; an unmapped one makes sure of that.
void* device_pointer() { return (void*)(uintptr_t)0x100000; }

int check(const char* what, int error) {
  if (error == cudaSuccess) return 0;
  std::fprintf(stderr, "%s, case \"%s\": %s\n", what, running.c_str(),
               cudaGetErrorString((cudaError_t)error));
  return 1;
}

int moe(int tokens, int inter_size) {
  running = "moe M=" + std::to_string(tokens) + (inter_size == 1024 ? " TP2" : " TP1");
  Dsv4MoeArgs args = {};
  args.hidden = args.w13 = args.w13_scale = args.w2 = args.w2_scale = device_pointer();
  args.topk_ids = (const int32_t*)device_pointer();
  args.topk_weights = (const float*)device_pointer();
  args.out = args.workspace = device_pointer();
  args.num_tokens = tokens;
  args.top_k = 6;
  args.num_experts = 256;
  args.hidden_size = 4096;
  args.inter_size = inter_size;
  args.swiglu_limit = 10.0f;
  return check("dsv4_moe", dsv4_moe(&args, nullptr));
}

int gemm(int size_m, int size_n, int size_k) {
  running = "gemm M=" + std::to_string(size_m) + " " + std::to_string(size_n) + "x" +
            std::to_string(size_k);
  Dsv4GemmArgs args = {};
  args.a = args.weight = args.scale = device_pointer();
  args.out = args.workspace = device_pointer();
  args.size_m = size_m;
  args.size_n = size_n;
  args.size_k = size_k;
  return check("dsv4_gemm", dsv4_gemm(&args, nullptr));
}

int silu(int rows) {
  running = "silu " + std::to_string(rows) + " rows";
  void* pointer = device_pointer();
  return check("dsv4_silu_interleaved",
               dsv4_silu_interleaved(pointer, pointer, rows, 1024, INFINITY, nullptr));
}

int all_reduce(int num_bytes) {
  running = "all-reduce " + std::to_string(num_bytes) + " bytes";
  Dsv4AllReduceArgs args = {};
  args.in = args.out = args.inbox[0] = args.inbox[1] = device_pointer();
  args.state = (Dsv4State*)device_pointer();
  args.control = (Dsv4Control*)device_pointer();
  args.deadline_ns = 2000000000;
  args.num_bytes = num_bytes;
  args.max_bytes = DSV4_ALLREDUCE_MAX_BYTES;
  args.world_size = 2;
  return check("dsv4_allreduce", dsv4_allreduce(&args, nullptr));
}

int probe(int num_bytes, int num_blocks) {
  running = "probe " + std::to_string(num_bytes) + " bytes";
  Dsv4ProbeArgs args = {};
  args.write_data = args.my_flags = args.peer_flags = device_pointer();
  args.read_data = device_pointer();
  args.results = (Dsv4ProbeResult*)device_pointer();
  args.deadline_ns = 2000000000;
  args.send_lines = num_bytes / 16 / num_blocks;
  args.rounds = 1;
  args.num_blocks = num_blocks;
  return check("dsv4_probe", dsv4_probe(&args, nullptr));
}

}  // namespace

// Usage: dry_run MULTIPROCESSORS MAJOR MINOR SHARED_BYTES_PER_BLOCK
int main(int argc, char** argv) {
  if (argc != 5) return 2;
  multiprocessors = std::atoi(argv[1]);
  major = std::atoi(argv[2]);
  minor = std::atoi(argv[3]);
  optin_bytes = std::atoi(argv[4]);
  int failed = 0;
  for (int tokens : {1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 257, 2048}) failed += moe(tokens, 1024);
  for (int tokens : {1, 2, 64}) failed += moe(tokens, 2048);
  for (int size_m : {1, 2, 8, 9, 16, 17, 64, 257}) failed += gemm(size_m, 4096, 4096);
  failed += silu(6);
  for (int num_bytes : {16, 8192, 65536, 524288}) failed += all_reduce(num_bytes);
  failed += probe(8192, 1) + probe(4 << 20, 8);
  return failed ? 1 : 0;
}
