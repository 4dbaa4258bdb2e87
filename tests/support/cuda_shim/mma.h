// nvcuda::wmma 16 x 16 x 16: each lane keeps elements lane, lane + 32, ..; CUDA hides its layout
// too. Only mma_sync waits for the warp, as it reads other lanes' fragments.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr bool turned = std::is_same_v<Layout, col_major>;
  T x[8];
};

template <class F>
void fill_fragment(F& f, float value) {
  for (auto& x : f.x) x = value;
}

inline int row_of(int i) { return (i * 32 + cuda_shim::lane()) / 16; }
inline int column_of(int i) { return (i * 32 + cuda_shim::lane()) % 16; }

template <class F, class T>
void load_matrix_sync(F& f, const T* p, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || stride * sizeof(T) % 16) std::abort();
  for (int i = 0; i < 8; ++i)
    f.x[i] =
        F::turned ? p[column_of(i) * stride + row_of(i)] : p[row_of(i) * stride + column_of(i)];
}

template <class F>
void store_matrix_sync(float* p, const F& f, unsigned stride, layout_t) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || stride % 4) std::abort();
  for (int i = 0; i < 8; ++i) p[row_of(i) * stride + column_of(i)] = f.x[i];
}

inline float number(__half v) { return __half2float(v); }
inline float number(__nv_bfloat16 v) { return __bfloat162float(v); }

struct Operands {
  float a[8], b[8];
};

template <class D, class A, class B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
  Operands mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = number(a.x[i]), mine.b[i] = number(b.x[i]);
  const Operands* all = cuda_shim::exchange(mine);
  for (int i = 0; i < 8; ++i) {
    const int row = row_of(i), column = column_of(i);
    float sum = c.x[i];
    for (int k = 0; k < 16; ++k) {
      const int left = row * 16 + k, right = k * 16 + column;
      sum += all[left % 32].a[left / 32] * all[right % 32].b[right / 32];
    }
    d.x[i] = sum;
  }
}

}  // namespace nvcuda::wmma

namespace cuda_shim {

// The instruction of csrc/cuda/terms.h: lane 4 i + q has numbers 4 q .. 4 q + 3 of rows i and i + 8
// of the left, of column i of the right, and sums 2 q and 2 q + 1 of both rows.
template <class Term>
void mma_m16n8k16(float* sums, const Term* top, const Term* bottom, const Term* right) {
  using nvcuda::wmma::number;
  struct Operands {
    float left[2][4], right[4];
  } mine;
  for (int v = 0; v < 4; ++v) {
    mine.left[0][v] = number(top[v]), mine.left[1][v] = number(bottom[v]);
    mine.right[v] = number(right[v]);
  }
  const Operands* all = exchange(mine);
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      sums[i] +=
          all[row * 4 + k / 4].left[i / 2][k % 4] * all[(column + i % 2) * 4 + k / 4].right[k % 4];
}

}  // namespace cuda_shim
