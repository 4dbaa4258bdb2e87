// The extension module for one instruction set: build_info() describes the build;
// register_operators() registers its operators with PyTorch for CPU tensors.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/register.h"
#include "tensors.h"

// setup.py defines LORA_MOE_ISA as a bare word, say avx2, for the module's name and for the facts
#define TEXT_OF(word) #word
#define TEXT(macro) TEXT_OF(macro)
#define MODULE_OF(isa) _C_##isa
#define MODULE(isa) MODULE_OF(isa)

namespace lora_moe {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

#ifdef NDEBUG
constexpr const char* kBuildType = "release";
#else
constexpr const char* kBuildType = "debug";
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["isa"] = TEXT(LORA_MOE_ISA);
  info["operators"] = kOperators;
  info["compiler"] = kCompiler;
  info["build_type"] = kBuildType;
  info["torch_version"] = TORCH_VERSION;                      // the headers used
  info["torch_target_version"] = TEXT(TORCH_TARGET_VERSION);  // the oldest version that can load it
  info["pybind11_version"] = TEXT(PYBIND11_VERSION_MAJOR) "." TEXT(PYBIND11_VERSION_MINOR) "." TEXT(
      PYBIND11_VERSION_PATCH);
  return info;
}

void register_operators() {
  static Library library(Library::Kind::IMPL, "lora_moe", "CPU", __FILE__, __LINE__);
  register_linear(library);
  register_router(library);
  register_forward(library);
  register_backward(library);
}

}  // namespace
}  // namespace lora_moe

PYBIND11_MODULE(MODULE(LORA_MOE_ISA), m) {
  m.doc() = "lora_moe operators for CPU tensors, built for " TEXT(LORA_MOE_ISA);
  m.def("build_info", &lora_moe::build_info, "What was built, and with what.");
  m.def("register_operators", &lora_moe::register_operators, "Serve CPU tensors.");
}
