// Numbers as sums of bf16 terms, so that the tensor cores multiply them without an error: an fp32
// number has 24 bits, a term 8.
#pragma once

#include <mma.h>

#include "numbers.h"

namespace lora_moe::cuda {

// Four numbers, the highest terms first: three of an fp32 number, two of an fp16 one.  kHalves: two
// of an fp32 one, which err by 2^-16.
template <class T, bool kHalves = false>
struct Terms {
  static constexpr int kCount = std::is_same_v<T, bf16> ? 1 : kHalf<T> || kHalves ? 2 : 3;
  Pack<bf16, 4> term[kCount];

  __device__ void split(const Pack<T, 4>& numbers) {
    if constexpr (kCount == 1) {
      term[0] = numbers;
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        float rest = widen(numbers.v[v]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          term[i].v[v] = narrow<bf16>(rest);
          rest -= widen(term[i].v[v]);
        }
      }
    }
  }
};

// sums (16, 8) += left (16, 16) @ right (16, 8), by a warp.  A lane has columns lane % 4 * 4 .. + 3
// of rows lane / 4 (`top`) and lane / 4 + 8 (`bottom`) of left, and as many rows of column lane / 4
// of right: the instruction counts k in another order, the same for both.
__device__ inline void multiply_add(float (&sums)[4], const Pack<bf16, 4>& top,
                                    const Pack<bf16, 4>& bottom, const Pack<bf16, 4>& right) {
#if !defined(__NVCC__)
  cuda_shim::mma_m16n8k16(sums, top.v, bottom.v, right.v);
#elif __CUDA_ARCH__ >= 800
  const auto* t = reinterpret_cast<const uint32_t*>(&top);
  const auto* b = reinterpret_cast<const uint32_t*>(&bottom);
  const auto* r = reinterpret_cast<const uint32_t*>(&right);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(t[0]), "r"(b[0]), "r"(t[1]), "r"(b[1]), "r"(r[0]), "r"(r[1]));
#endif
}

}  // namespace lora_moe::cuda
