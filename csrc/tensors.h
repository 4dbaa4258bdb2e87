// What the operators of every device share: stable-ABI tensors, checks and their messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lora_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// Why not TORCH_CHECK: the stable ABI's own macro buries the message under file and function names.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (__builtin_expect(ok, 1)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(const Ints& sizes) {
  std::string out = "(";
  for (int64_t n : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + ")";
}

// t, or a copy of it in another floating dtype, rounded to nearest.
inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  const ScalarType own = t.scalar_type();
  if (own == dtype) return t;
  check(own == ScalarType::Float || own == ScalarType::BFloat16 || own == ScalarType::Half ||
            own == ScalarType::Double,
        "parameter: expected a floating dtype, got code ", int(own));
  Tensor out = torch::stable::new_empty(t, t.sizes(), dtype);
  torch::stable::copy_(out, t);
  return out;
}

}  // namespace lora_moe
