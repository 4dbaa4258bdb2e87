// Shared by the operators of every device: stable-ABI tensors, checks and their messages.
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

// Version of the operators' schemas: must equal ops.VERSION in Python, which refuses other builds.
constexpr int kOperators = 5;

// Raised if an operator refuses its arguments: ValueError in Python, as from the public functions,
// and distinct from allocation failures and bugs.  Not TORCH_CHECK, because the stable ABI's macro
// buries the message under file and function names.
template <class... Words>
[[noreturn]] inline void refuse(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

template <class... Words>
inline void check(bool ok, const Words&... words) {
  if (!__builtin_expect(ok, 1)) refuse(words...);
}

inline std::string text(const Ints& sizes) {
  std::string out = "(";
  for (int64_t n : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + ")";
}

// As PyTorch prints it.
inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return torch::headeronly::toString(dtype);  // quantized and rarer types, as C++ calls them
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline Ints sizes_of(const Tensor& t) {
  Ints sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

// The name, the dtype and the shape of an operand.
inline void check_operand(const char* name, const Tensor& t, ScalarType dtype, const Ints& shape) {
  check(t.scalar_type() == dtype, name, ": expected ", text(dtype), ", got ",
        text(t.scalar_type()));
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  if (!same) refuse(name, ": expected shape ", text(shape), ", got ", text(sizes_of(t)));
}

// Rows of a matrix may have any stride, with contiguous elements; with one element or none, any
// element stride is valid.
inline void check_columns(const char* name, const Tensor& t) {
  check(t.size(0) == 0 || t.size(1) <= 1 || t.stride(1) == 1, name,
        ": expected unit stride along columns, got ", t.stride(1));
}

// t, or a copy of it in another floating dtype, rounded to nearest.
inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  const ScalarType own = t.scalar_type();
  if (own == dtype) return t;
  check(is_floating(own), "parameter: expected a floating dtype, got ", text(own));
  Tensor out = torch::stable::new_empty(t, t.sizes(), dtype);
  torch::stable::copy_(out, t);
  return out;
}

// Rows of x and of y per token: one, or one per slot.
struct RowsPerToken {
  int64_t x = 1, y = 1;

  RowsPerToken() = default;
  RowsPerToken(const std::string& slots, int64_t K, bool shared_a) {
    if (slots == "none") return;
    check(slots == "apart" || slots == "sum", "slots: expected 'none', 'apart' or 'sum', got '",
          slots, "'");
    check(!shared_a, "slots: expected 'none' with a shared A, got '", slots, "'");
    (slots == "apart" ? y : x) = K;
  }
};

}  // namespace lora_moe
