// Memory that two processes share: registration, allocation, IPC. No kernels.
#include <cuda_runtime.h>

#include <cstring>

#include "allreduce.h"

static_assert(sizeof(cudaIpcMemHandle_t) == DSV4_IPC_HANDLE_BYTES, "the ABI's handle");

extern "C" int dsv4_device_count(int32_t* count) { return cudaGetDeviceCount(count); }

extern "C" int dsv4_set_device(int32_t device) { return cudaSetDevice(device); }

extern "C" int dsv4_device_bus_id(int32_t device, char* text, int32_t size) {
  return cudaDeviceGetPCIBusId(text, size, device);
}

extern "C" int dsv4_synchronize(void) { return cudaDeviceSynchronize(); }

extern "C" int dsv4_host_register(void* pointer, size_t bytes, void** device_pointer) {
  cudaError_t error =
      cudaHostRegister(pointer, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error == cudaSuccess) {
    error = cudaHostGetDevicePointer(device_pointer, pointer, 0);
    if (error != cudaSuccess) cudaHostUnregister(pointer);
  }
  if (error != cudaSuccess) cudaGetLastError();  // told; not to be told again by the next launch
  return error;
}

extern "C" int dsv4_host_unregister(void* pointer) { return cudaHostUnregister(pointer); }

extern "C" int dsv4_device_alloc(size_t bytes, void** pointer) {
  cudaError_t error = cudaMalloc(pointer, bytes);
  if (error == cudaSuccess) {
    error = cudaMemset(*pointer, 0, bytes);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();  // a peer may look at once
    if (error != cudaSuccess) cudaFree(*pointer);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

extern "C" int dsv4_device_free(void* pointer) { return cudaFree(pointer); }

extern "C" int dsv4_device_write(void* pointer, const void* from, size_t bytes) {
  return cudaMemcpy(pointer, from, bytes, cudaMemcpyDefault);
}

extern "C" int dsv4_device_read(void* to, const void* pointer, size_t bytes) {
  return cudaMemcpy(to, pointer, bytes, cudaMemcpyDefault);
}

extern "C" int dsv4_ipc_export(void* pointer, void* handle) {
  cudaIpcMemHandle_t made;
  cudaError_t error = cudaIpcGetMemHandle(&made, pointer);
  if (error == cudaSuccess) std::memcpy(handle, &made, sizeof made);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

extern "C" int dsv4_ipc_open(const void* handle, void** pointer) {
  cudaIpcMemHandle_t given;
  std::memcpy(&given, handle, sizeof given);
  cudaError_t error = cudaIpcOpenMemHandle(pointer, given, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

extern "C" int dsv4_ipc_close(void* pointer) { return cudaIpcCloseMemHandle(pointer); }
