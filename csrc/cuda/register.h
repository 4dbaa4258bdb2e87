// Registers the operators for CUDA tensors, one function per file.  If Triton serves CUDA tensors,
// none of them is registered, but `lora-moe info` still shows what was built.
#pragma once

#include "../register.h"

namespace lora_moe::cuda {

void register_linear(Library&);
void register_router(Library&);
void register_forward(Library&);
void register_backward(Library&);

}  // namespace lora_moe::cuda
