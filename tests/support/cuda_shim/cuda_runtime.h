// As much of CUDA C++ as the kernels use, for a C++ compiler: found in place of CUDA's own header.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block runs at a time

using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline void __syncthreads(std::source_location here = std::source_location::current()) {
  if (!cuda_shim::is_skipped(here)) cuda_shim::wait_for_block();
}
inline void __syncwarp(unsigned = ~0u,
                       std::source_location here = std::source_location::current()) {
  if (!cuda_shim::is_skipped(here)) cuda_shim::wait_for_warp();
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return cuda_shim::exchange(value)[cuda_shim::lane() ^ bits];
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_shim::exchange(value)[lane];
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  const bool* all = cuda_shim::exchange(mine);
  unsigned lanes = 0;
  for (unsigned i = 0; i < 32; ++i) lanes |= unsigned(all[i]) << i;
  return lanes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "success" : "invalid configuration";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* major = std::getenv("CUDA_SHIM_CAPABILITY");
  *value = major ? std::atoi(major) : 9;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Params... params) {
  const dim3 grid = config->gridDim;
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y - 1 > 65534 || grid.z - 1 > 65534)
    return cudaErrorInvalidConfiguration;
  cuda_shim::run_grid(grid, config->blockDim, [&] { kernel(params...); });
  return cudaSuccess;
}
