// Registers the operators for CPU tensors, one function per file.
#pragma once

#include "../register.h"

namespace lora_moe {

void register_linear(Library&);
void register_router(Library&);
void register_forward(Library&);
void register_backward(Library&);

}  // namespace lora_moe
