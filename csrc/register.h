// Operators are registered when backend.py says so, not when their module is imported: it looks
// first at what was built, and for what.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lora_moe {

using Library = torch::stable::detail::StableLibrary;

}  // namespace lora_moe
