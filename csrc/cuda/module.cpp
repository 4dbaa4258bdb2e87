// The extension module of the CUDA kernels: build_info() describes the build;
// register_operators() registers them with PyTorch for CUDA tensors.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "../tensors.h"
#include "register.h"

// setup.py defines LORA_MOE_CUDA_ARCHS as bare words, say 8.0;9.0+PTX
#define TEXT_OF(words) #words
#define TEXT(macro) TEXT_OF(macro)

namespace lora_moe::cuda {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["architectures"] = TEXT(LORA_MOE_CUDA_ARCHS);
  info["operators"] = kOperators;
  info["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["torch_version"] = TORCH_VERSION;                      // the headers used
  info["torch_target_version"] = TEXT(TORCH_TARGET_VERSION);  // the oldest version that can load it
  return info;
}

void register_operators() {
  static Library library(Library::Kind::IMPL, "lora_moe", "CUDA", __FILE__, __LINE__);
  register_linear(library);
  register_router(library);
  register_forward(library);
  register_backward(library);
}

}  // namespace
}  // namespace lora_moe::cuda

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "lora_moe operators for CUDA tensors";
  m.def("build_info", &lora_moe::cuda::build_info, "What was built, and with what.");
  m.def("register_operators", &lora_moe::cuda::register_operators, "Serve CUDA tensors.");
}
