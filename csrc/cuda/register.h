// Operators are registered when backend.py says so, not when the module is imported: where Triton
// serves CUDA tensors, `lora-moe info` still tells what was built.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lora_moe::cuda {

using Library = torch::stable::detail::StableLibrary;

void register_linear(Library&);
void register_router(Library&);
void register_forward(Library&);
void register_backward(Library&);

}  // namespace lora_moe::cuda
