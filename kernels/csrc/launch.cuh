// Host side of a launch: what the device can do, and one way to start a kernel.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

namespace dsv4 {

struct Device {
  int multiprocessors = 0;
  bool dependent_launch = false;  // sm_90 and later
};

// The current device; asked once per device.
inline cudaError_t current_device(Device* device, int* index) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, else 2 * multiprocessors + flag
  cudaError_t error = cudaGetDevice(index);
  if (error != cudaSuccess) return error;
  if (*index >= kMaxDevices) return cudaErrorInvalidDevice;
  int packed = known[*index].load();
  if (packed == 0) {
    int count = 0, major = 0;
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, *index);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *index);
    if (error != cudaSuccess) return error;
    packed = 2 * count + (major >= 9);
    known[*index].store(packed);
  }
  device->multiprocessors = packed / 2;
  device->dependent_launch = packed & 1;
  return cudaSuccess;
}

// Starts kKernel with `shared_bytes` of dynamic shared memory. `dependent`: it may start while the
// kernel before it still runs, and waits for it by itself.
template <auto kKernel, class Args>
cudaError_t launch(dim3 grid, int threads, size_t shared_bytes, bool dependent, cudaStream_t stream,
                   const Args& args) {
  static std::atomic<unsigned long long> prepared{0};  // a bit per device
  Device device;
  int index = 0;
  cudaError_t error = current_device(&device, &index);
  if (error != cudaSuccess) return error;
  if (shared_bytes > 0 && !(prepared.load() >> index & 1)) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)shared_bytes);
    if (error != cudaSuccess) return error;
    // Two blocks per multiprocessor, and no change of the split between kernels of a chain.
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    prepared.fetch_or(1ull << index);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent && device.dependent_launch ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kKernel, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

__host__ __device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Hands out 256-byte aligned pieces of a workspace; with base nullptr it only adds up.
struct Pieces {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    T* piece = (T*)(base + used);
    used += (count * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
};

}  // namespace dsv4
