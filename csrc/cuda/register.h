// The operators for CUDA tensors, a file of them each.  Where Triton serves CUDA tensors none of
// them is registered, and `lora-moe info` still tells what was built.
#pragma once

#include "../register.h"

namespace lora_moe::cuda {

void register_linear(Library&);
void register_router(Library&);
void register_forward(Library&);
void register_backward(Library&);

}  // namespace lora_moe::cuda
