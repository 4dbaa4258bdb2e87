// Operators are registered by backend.py, not on import of their module: backend.py first checks
// what was built, and for which target.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lora_moe {

using Library = torch::stable::detail::StableLibrary;

}  // namespace lora_moe
