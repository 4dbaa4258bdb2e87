// Launching a kernel from the host, and the error if it did not start.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lora_moe::cuda {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
            cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  require(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}

}  // namespace lora_moe::cuda
