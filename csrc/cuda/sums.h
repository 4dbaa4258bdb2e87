// A warp's sums of a matrix product, by the operands' types: what Product (product.h) adds up.
//
//   Sums       both 16-bit, on the tensor cores
//   SplitSums  one of them fp32, in 16-bit terms on the tensor cores
//   ExactSums  both fp32, by multiply-adds

#pragma once

#include <mma.h>

#include "numbers.h"
#include "terms.h"

namespace lora_moe::cuda {

constexpr int kThreads = 256;  // eight warps, two along M and four along N
constexpr int kWarps = kThreads / 32;
constexpr int kPatchStride = 20;  // staging from a warp's accumulators to memory: 16 x 16, padded

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

// Sixteen by sixteen sums of a warp, on the tensor cores ..
template <class Left, class Right, bool kLeftAlongK, bool kRightAlongK>
struct Sums {
  static constexpr int kStep = 16;
  using Layout = nvcuda::wmma::row_major;
  using Turned = nvcuda::wmma::col_major;
  using LeftLayout = std::conditional_t<kLeftAlongK, Layout, Turned>;
  using RightLayout = std::conditional_t<kRightAlongK, Turned, Layout>;
  using LeftFragment = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, Left, LeftLayout>;
  using RightFragment =
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, Right, RightLayout>;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums;

  __device__ void zero() { nvcuda::wmma::fill_fragment(sums, 0.f); }
  static __device__ void load(LeftFragment& fragment, const Left* tile, int stride) {
    nvcuda::wmma::load_matrix_sync(fragment, tile, stride);
  }
  static __device__ void load(RightFragment& fragment, const Right* tile, int stride) {
    nvcuda::wmma::load_matrix_sync(fragment, tile, stride);
  }
  __device__ void add(const LeftFragment& left, const RightFragment& right) {
    nvcuda::wmma::mma_sync(sums, left, right, sums);
  }
  __device__ void put(float* patch) const {
    nvcuda::wmma::store_matrix_sync(patch, sums, kPatchStride, nvcuda::wmma::mem_row_major);
  }
};

// Numbers k .. k+3 of row or column i of a tile.
template <bool kAlongK, class T>
__device__ Pack<T, 4> along_k(const T* tile, int i, int k, int stride) {
  if constexpr (kAlongK) {
    return *reinterpret_cast<const Pack<T, 4>*>(tile + i * stride + k);
  } else {
    Pack<T, 4> out;
#pragma unroll
    for (int v = 0; v < 4; ++v) out.v[v] = tile[(k + v) * stride + i];
    return out;
  }
}

// .. in terms on the tensor cores, if one operand is fp32, or both are and the sum will be rounded
// to 16 bits: a lane has rows lane / 4 + 8 i and columns lane % 4 * 2 + 8 j and the next ..
template <class Left, class Right, class Term, bool kLeftAlongK, bool kRightAlongK>
struct SplitSums {
  static constexpr int kStep = 16;
  static constexpr bool kBothWide = std::is_same_v<Left, Right>;
  using LeftTerms = Terms<Left, Term, kBothWide>;
  using RightTerms = Terms<Right, Term, kBothWide>;
  struct LeftFragment {
    LeftTerms row[2];
  };
  struct Column {
    RightTerms terms;
    float units[2] = {1.f, 1.f};  // of the lane's two columns of the sums

    __device__ void split(const Pack<Right, 4>& numbers) {
      terms.split(numbers);
#pragma unroll
      for (int i = 0; RightTerms::kScaled && i < 2; ++i)
        units[i] = __shfl_sync(kAllLanes, terms.unit, lane_id() % 4 * 8 + 4 * i);
    }
  };
  struct RightFragment {
    Column column[2];
  };
  float sums[2][4];

  __device__ void zero() {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.f;
  }
  static __device__ void load(LeftFragment& fragment, const Left* tile, int stride) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      fragment.row[i].split(
          along_k<kLeftAlongK>(tile, lane_id() / 4 + 8 * i, lane_id() % 4 * 4, stride));
  }
  static __device__ void load(RightFragment& fragment, const Right* tile, int stride) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      fragment.column[j].split(
          along_k<kRightAlongK>(tile, lane_id() / 4 + 8 * j, lane_id() % 4 * 4, stride));
  }
  __device__ void add(const LeftFragment& left, const RightFragment& right) {
#pragma unroll
    for (int j = 0; j < 2; ++j) add(left, right.column[j], j);
  }
  // The smallest products first; that of two low halves is omitted, as it is within their error.
  // They are summed separately, because the tensor cores truncate where fp32 rounds.
  __device__ void add(const LeftFragment& left, const Column& right, int j) {
    float step[4] = {};
#pragma unroll
    for (int l = LeftTerms::kCount - 1; l >= 0; --l)
#pragma unroll
      for (int r = RightTerms::kCount - 1; r >= 0; --r)
        if (!kBothWide || l + r < 2)
          multiply_add(step, left.row[0].term[l], left.row[1].term[l], right.terms.term[r]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] += step[i] * left.row[i / 2].unit * right.units[i % 2];
  }
  // f(row, column, sum)
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      f(lane_id() / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane_id() % 4 * 2 + i % 2, sums[i / 4][i % 4]);
  }
  __device__ void put(float* patch) const {
    each([&](int row, int column, float sum) { patch[row * kPatchStride + column] = sum; });
  }
};

// .. and in fp32: a lane has rows lane / 4 + 8 i and columns lane % 4 + 4 j.  A step's products are
// summed separately before they are added to the total, which is more accurate than one long sum.
template <class Left, class Right, bool kLeftAlongK, bool kRightAlongK>
struct ExactSums {
  static constexpr int kStep = 4;
  struct LeftFragment {
    Pack<Left, kStep> row[2];
  };
  struct RightFragment {
    Pack<Right, kStep> column[4];
  };
  float sums[2][4];

  __device__ void zero() {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.f;
  }
  __device__ void join(const ExactSums& step) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += step.sums[i / 4][i % 4];
  }
  static __device__ void load(LeftFragment& fragment, const Left* tile, int stride) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      fragment.row[i] = along_k<kLeftAlongK>(tile, lane_id() / 4 + 8 * i, 0, stride);
  }
  static __device__ void load(RightFragment& fragment, const Right* tile, int stride) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      fragment.column[j] = along_k<kRightAlongK>(tile, lane_id() % 4 + 4 * j, 0, stride);
  }
  __device__ void add(const LeftFragment& left, const RightFragment& right) {
#pragma unroll
    for (int k = 0; k < kStep; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i][j] = fmaf(widen(left.row[i].v[k]), widen(right.column[j].v[k]), sums[i][j]);
  }
  __device__ void put(float* patch) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        patch[(lane_id() / 4 + 8 * i) * kPatchStride + lane_id() % 4 + 4 * j] = sums[i][j];
  }
};

}  // namespace lora_moe::cuda
