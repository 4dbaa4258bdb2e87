// From stable-ABI tensors to typed rows and back: views, allocation, checks, dispatch on dtype.
#pragma once

#include <algorithm>
#include <memory>

#include "../tensors.h"
#include "simd.h"

namespace lora_moe {

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, f16>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  return ScalarType::Float;
}

// A matrix of rows with unit stride along columns; `row` may step by any stride, 0 included.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  T* row(int64_t t) const { return data + t * stride; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
inline const T* data(const char* name, const Tensor& t, Ints shape) {
  check(t.is_cpu(), name, ": expected a CPU tensor");
  check(t.scalar_type() == scalar_type_of<T>(), name, ": wrong dtype, expected code ",
        int(scalar_type_of<T>()), ", got ", int(t.scalar_type()));
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  if (!same) {
    Ints got;
    for (int64_t i = 0; i < t.dim(); ++i) got.push_back(t.size(i));
    check(false, name, ": expected shape ", text(shape), ", got ", text(got));
  }
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
inline const T* contiguous(const char* name, const Tensor& t, Ints shape) {
  const T* p = data<T>(name, t, shape);
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
  return p;
}

template <class T>
inline const T* contiguous(const char* name, const MaybeTensor& t, Ints shape) {
  return t ? contiguous<T>(name, *t, shape) : nullptr;
}

template <class T>
inline Rows<const T> rows(const char* name, const Tensor& t, int64_t n, int64_t columns) {
  const T* p = data<T>(name, t, {n, columns});
  check(columns <= 1 || t.stride(1) == 1, name, ": expected unit stride along columns");
  return {p, t.stride(0)};
}

template <class T>
inline Rows<const T> rows(const char* name, const MaybeTensor& t, int64_t n, int64_t columns) {
  return t ? rows<T>(name, *t, n, columns) : Rows<const T>{};
}

template <class T>
inline Tensor empty(const Tensor& like, Ints shape) {
  return torch::stable::new_empty(like, shape, scalar_type_of<T>());
}

template <class T>
inline T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// f.template operator()<T>() for the dtype of x.
template <class F>
inline auto dispatch(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<f16>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      throw std::runtime_error("x: expected float32, float64, bfloat16 or float16");
  }
}

// The router's weight has x's dtype T or the accumulator's: f.template operator()<T, W>().
template <class F>
inline auto dispatch(const Tensor& x, const Tensor& w, F f) {
  return dispatch(x, [&]<class T>() {
    if constexpr (!std::is_same_v<T, acc_t<T>>)
      if (w.scalar_type() == scalar_type_of<acc_t<T>>())
        return f.template operator()<T, acc_t<T>>();
    return f.template operator()<T, T>();
  });
}

// Rows of a block of tokens: a function of T alone, so that a sum over blocks has the same bits
// for any number of threads; small enough that a block's rows stay in the second-level cache.
inline int64_t block_rows(int64_t T) {
  const int64_t rows = (T + 7) / 8;  // at least eight blocks where there are tokens for them
  return rows < 4 ? 4 : rows > 64 ? 64 : (rows + 3) / 4 * 4;
}

// f(block, first token, one past the last), in parallel over blocks of tokens.
template <class F>
inline void for_blocks(int64_t T, F f) {
  const int64_t size = block_rows(T);
  torch::stable::parallel_for(0, (T + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block, block * size, T < (block + 1) * size ? T : (block + 1) * size);
  });
}

inline int64_t count_blocks(int64_t T) {
  const int64_t size = block_rows(T);
  return (T + size - 1) / size;
}

}  // namespace lora_moe
