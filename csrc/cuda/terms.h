// Numbers as sums of 16-bit terms, which the tensor cores multiply exactly: an fp32 number has 24
// bits, a term 11 (fp16) or 8 (bf16).
//
// fp16 spans 40 powers of two, fp32 277.  So the sixteen fp32 numbers of a row that are summed over
// in one step become multiples of a power of two, the largest being 2^14 to 2^15 times it.  None
// overflows, and all within 2^-15 of the largest keep their 24 bits for any loss scale.  If one is
// infinite, the others become zero.
#pragma once

#include <mma.h>

#include "numbers.h"

namespace lora_moe::cuda {

// Four numbers, highest terms first: three terms for an fp32 number, or two with kHalves, with an
// error of 2^-22 in fp16 and 2^-16 in bf16; a number of the terms' own type is a single term.
template <class T, class Term, bool kHalves = false>
struct Terms {
  static constexpr int kCount = std::is_same_v<T, Term> ? 1 : kHalves ? 2 : 3;
  static constexpr bool kScaled = kCount > 1 && std::is_same_v<Term, f16>;
  Pack<Term, 4> term[kCount];
  float unit = 1.f;  // unit of the terms, the same for the four lanes that share a row

  __device__ void split(const Pack<T, 4>& numbers) {
    if constexpr (kCount == 1) {
      term[0] = numbers;
    } else {
      float in_units = 1.f;
      if constexpr (kScaled) in_units = find_unit(numbers);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        float rest = numbers.v[v] * in_units;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          term[i].v[v] = narrow<Term>(rest);
          const float value = widen(term[i].v[v]);
          rest = isinf(value) ? 0.f : rest - value;
        }
      }
    }
  }

 private:
  // Sets the unit from the exponent of the row's largest number and returns its inverse.
  __device__ float find_unit(const Pack<T, 4>& numbers) {
    float top = 0.f;
#pragma unroll
    for (int v = 0; v < 4; ++v) top = fmaxf(top, fabsf(numbers.v[v]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    const int exponent = max(__float_as_int(top) >> 23, 15);  // for a unit of at least 2^-126
    unit = __int_as_float((exponent - 14) << 23);
    return __int_as_float((268 - exponent) << 23);
  }
};

// sums (16, 8) += left (16, 16) @ right (16, 8), by a warp.  A lane has columns lane % 4 * 4 .. + 3
// of rows lane / 4 (`top`) and lane / 4 + 8 (`bottom`) of left, and as many rows of column lane / 4
// of right: the instruction numbers k in a different order, the same for both.
template <class Term>
__device__ void multiply_add(float (&sums)[4], const Pack<Term, 4>& top,
                             const Pack<Term, 4>& bottom, const Pack<Term, 4>& right) {
#if !defined(__NVCC__)
  cuda_shim::mma_m16n8k16(sums, top.v, bottom.v, right.v);
#else
  const auto* t = reinterpret_cast<const uint32_t*>(&top);
  const auto* b = reinterpret_cast<const uint32_t*>(&bottom);
  const auto* r = reinterpret_cast<const uint32_t*>(&right);
#if __CUDA_ARCH__ >= 800
#define LORA_MOE_MMA(type)                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
      : "r"(t[0]), "r"(b[0]), "r"(t[1]), "r"(b[1]), "r"(r[0]), "r"(r[1]))
  if constexpr (std::is_same_v<Term, f16>)
    LORA_MOE_MMA("f16");
  else
    LORA_MOE_MMA("bf16");
#undef LORA_MOE_MMA
#else  // sm_75 takes half of them at a time, and has no bf16
#pragma unroll
  for (int i = 0; i < 2 && kServed<Term>; ++i)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(t[i]), "r"(b[i]), "r"(r[i]));
#endif
#endif
}

}  // namespace lora_moe::cuda
