// From stable-ABI tensors to typed rows and back: views, allocation, checks, dispatch on dtype.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "../tensors.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// A matrix of rows with unit stride along columns; `row` may have any stride, including 0.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  T* row(int64_t t) const { return data + t * stride; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
inline const T* data(const char* name, const Tensor& t, const Ints& shape) {
  check(t.is_cpu(), name, ": expected a CPU tensor");
  check_operand(name, t, scalar_type_of<T>(), shape);
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
  check_columns(name, t);
  return {p, t.stride(0)};
}

template <class T>
inline Rows<const T> rows(const char* name, const MaybeTensor& t, int64_t n, int64_t columns) {
  return t ? rows<T>(name, *t, n, columns) : Rows<const T>{};
}

// Large results often come fresh from the operating system, which maps them at first touch: 2 MiB
// at a time if requested, as NumPy does, else 4 KiB (16 MiB: 0.8 ms and 5.5 ms on a Zen 5).
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (uintptr_t(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (uintptr_t(data) + bytes) & ~(page - 1);
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Not stable::new_empty, which looks up its operator by name: 0.8 us per tensor, 8 per forward.
template <class T>
inline Tensor empty(Ints shape) {
  Ints strides(shape.size());
  int64_t numel = 1;
  for (size_t i = shape.size(); i-- > 0; numel *= shape[i])
    strides[i] = std::max<int64_t>(numel, 1);
  const auto dtype = torch::stable::detail::from(scalar_type_of<T>());
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  const int64_t bytes = numel * int64_t(sizeof(T));
  if (bytes >= 1 << 22) prefer_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

template <class T>
inline T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialized memory for n numbers, on the stack if they are few: a large heap block costs a
// decoding step as much as its arithmetic.
template <class C>
class Room {
 public:
  explicit Room(int64_t n) : heap_(n > kStack ? new C[n] : nullptr) {}
  C* get() { return heap_ ? heap_.get() : reinterpret_cast<C*>(stack_); }

 private:
  static constexpr int64_t kStack = (1 << 14) / sizeof(C);
  std::unique_ptr<C[]> heap_;
  alignas(64) unsigned char stack_[kStack * sizeof(C)];
};

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
      refuse("x: expected float32, float64, bfloat16 or float16, got ", text(x.scalar_type()));
  }
}

// The router's weight has x's dtype T or the accumulator's:
// f.template operator()<T, RouterWeight>().
template <class F>
inline auto dispatch(const Tensor& x, const Tensor& w, F f) {
  return dispatch(x, [&]<class T>() {
    if constexpr (!std::is_same_v<T, acc_t<T>>)
      if (w.scalar_type() == scalar_type_of<acc_t<T>>())
        return f.template operator()<T, acc_t<T>>();
    return f.template operator()<T, T>();
  });
}

// f(0), .., f(n - 1), each on the next idle thread, so that tasks may differ in size.  Each task
// owns what it writes, so the result is the same for any number of threads.  Below this many bytes
// to read, waking the threads costs more than it saves.
constexpr int64_t kSerialBytes = 1 << 17;

template <class F>
inline void for_tasks(int64_t n, int64_t bytes, F f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  };
  if (n <= 1 || bytes < kSerialBytes) return work(0, n);
  torch::stable::parallel_for(0, n, 1, work);
}

// Up to this many tokens, a call reads more weights than activations, and its tasks are rows of the
// weights.  More tokens are processed in blocks, each completely while its rows are in cache.
constexpr int64_t kFewTokens = 64;

// Sums over tokens across blocks (mean_prob and counts) are taken in groups of this many tokens.
// Blocks consist of whole groups, so the bits do not depend on the block size.
constexpr int64_t kGroup = 64;
inline int64_t groups(int64_t T) { return (T + kGroup - 1) / kGroup; }

// Blocks of T tokens for E experts and K slots per token.  About 32 tokens per expert fill whole
// tiles and seldom reread its weights; two blocks per thread balance skewed routing.
struct Blocks {
  int64_t tokens, size;

  explicit Blocks(int64_t T, int64_t E = 1, int64_t K = 1) : tokens(T), size(T) {
    if (few()) return;
    const int64_t most =
        std::clamp<int64_t>(32 * E / std::max<int64_t>(K, 1), 2 * kGroup, 16 * kGroup);
    const int64_t share = T / (2 * int64_t(torch::stable::get_num_threads()));
    size = groups(std::clamp<int64_t>(share, 1, most)) * kGroup;
  }
  bool few() const { return tokens <= kFewTokens; }
  int64_t count() const { return tokens == 0 ? 0 : (tokens + size - 1) / size; }

  // f(first token, one past the last) of each block, in parallel
  template <class F>
  void run(F f) const {
    for_tasks(count(), kSerialBytes,
              [&](int64_t i) { f(i * size, std::min(tokens, (i + 1) * size)); });
  }
};

}  // namespace lora_moe
