// Number types, matrices of rows, and 16-byte loads of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace lora_moe::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

template <class T>
constexpr bool kHalf = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

// sm_75 has no bf16 tensor cores: bf16 kernels are empty there, and the operators refuse bf16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kServed = !std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kServed = true;
#endif

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows with unit stride along columns, `stride` elements apart (0: one row, repeated).
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;
  bool aligned = false;            // every row is 16-byte aligned: whole packs may be loaded
  const int32_t* index = nullptr;  // if given, row i is the matrix's row index[i]
  int64_t slot = 0;                // from a token's row to the row of its next slot (0: the same)

  Rows() = default;
  Rows(const T* data_, int64_t stride_) : data(data_), stride(stride_) {
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  }
  __host__ __device__ const T* row(int64_t i) const {
    return data + (index ? index[i] : i) * stride;
  }
  // The rows of every token's slot j.
  __host__ __device__ Rows of_slot(int64_t j) const {
    Rows rows = *this;
    rows.data += j * slot;
    rows.aligned = aligned && j * slot * sizeof(T) % 16 == 0;
    return rows;
  }
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

#if defined(__CUDACC__)

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(f16 v) { return __half2float(v); }
__device__ inline float widen(bf16 v) { return __bfloat162float(v); }

template <class T>
__device__ T narrow(float v) {
  if constexpr (std::is_same_v<T, f16>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(v);
  if constexpr (std::is_same_v<T, float>) return v;
}

template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

// Columns c .. c+N-1 of a row with zeros past `end`; a single load if the row is aligned.
template <int N, class T>
__device__ Pack<T, N> load_pack(const T* row, int64_t c, int64_t end, bool aligned) {
  if (aligned && c + N <= end) return *reinterpret_cast<const Pack<T, N>*>(row + c);
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = c + i < end ? row[c + i] : narrow<T>(0.f);
  return out;
}

template <int N, class T>
__device__ void store_pack(T* row, int64_t c, int64_t end, bool aligned, const Pack<T, N>& pack) {
  if (aligned && c + N <= end) {
    *reinterpret_cast<Pack<T, N>*>(row + c) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (c + i < end) row[c + i] = pack.v[i];
}

#endif

}  // namespace lora_moe::cuda
