// The matrix product of one block of threads:  out (BM, BN) = left @ right, summed in fp32.
//
// Tiles of both operands go from global memory through registers to shared memory, one step ahead
// of the products (two buffers, one barrier per step).  16-bit operands use the tensor cores; so
// does an fp32 operand paired with one, in 16-bit terms.  Two fp32 operands use fp32 multiply-adds.
// Rows of a tile are padded by 16 bytes, so the eight rows of a matrix load are in different banks.
//
// Letters: M rows, N columns of the result; K is summed over.
#pragma once

#include "sums.h"

namespace lora_moe::cuda {

// A tile in shared memory, with the layout it has in global memory.
template <class T, int kRows, int kColumns>
struct Tile {
  static constexpr int kPack = 16 / sizeof(T), kStride = kColumns + kPack;
  static constexpr int kBytes = kRows * kStride * sizeof(T);
  static constexpr int kPacks = kRows * kColumns / kPack;  // assigned to the threads in turn
  static constexpr int kMine = (kPacks + kThreads - 1) / kThreads;
  Pack<T> mine[kMine];

  // Rows row.., columns column.. of a matrix with `rows` x `columns`, zeros outside.
  __device__ void load(const Rows<T>& from, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int pack = threadIdx.x + i * kThreads;
      const int64_t r = row + pack / (kColumns / kPack);
      const int64_t c = column + pack % (kColumns / kPack) * kPack;
      const bool inside = pack < kPacks && r < rows;
      mine[i] =
          load_pack<kPack>(inside ? from.row(r) : from.data, c, inside ? columns : 0, from.aligned);
    }
  }
  __device__ void store(T* tile) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int pack = threadIdx.x + i * kThreads;
      if (pack >= kPacks) continue;
      const int r = pack / (kColumns / kPack), c = pack % (kColumns / kPack) * kPack;
      *reinterpret_cast<Pack<T>*>(tile + r * kStride + c) = mine[i];
    }
  }
};

// kLeftAlongK: left is stored as (M, K), else as (K, M); kRightAlongK: (N, K), else (K, N).
// Term: the type that the tensor cores multiply; also for an fp32 pair whose sums end in 16 bits.
template <class Left, class Right, bool kLeftAlongK, bool kRightAlongK, int BM, int BN,
          class Term = std::conditional_t<kHalf<Left>, Left, Right>>
struct Product {
  static constexpr bool kTensorCores = kHalf<Left> && kServed<Left> && std::is_same_v<Left, Right>;
  static constexpr int BK = kHalf<Left> && kHalf<Right> ? 32 : 16;
  using LeftTile = Tile<Left, kLeftAlongK ? BM : BK, kLeftAlongK ? BK : BM>;
  using RightTile = Tile<Right, kRightAlongK ? BN : BK, kRightAlongK ? BK : BN>;
  static constexpr bool kSplit = kHalf<Term> && !(kHalf<Left> && kHalf<Right>);
  using Fragment = std::conditional_t<
      kTensorCores, Sums<Left, Right, kLeftAlongK, kRightAlongK>,
      std::conditional_t<kSplit, SplitSums<Left, Right, Term, kLeftAlongK, kRightAlongK>,
                         ExactSums<Left, Right, kLeftAlongK, kRightAlongK>>>;
  static constexpr int kStepBytes = LeftTile::kBytes + RightTile::kBytes;
  static constexpr int kPatchBytes = kWarps * 16 * kPatchStride * 4;
  static constexpr int kBytes = 2 * kStepBytes > kPatchBytes ? 2 * kStepBytes : kPatchBytes;
  static constexpr int MI = BM / 32, NI = BN / 64;  // 16 x 16 fragments of a warp
  Fragment fragments[MI][NI];

  static __device__ int warp_m() { return warp_id() / 4 * (BM / 2); }
  static __device__ int warp_n() { return warp_id() % 4 * (BN / 4); }

  __device__ Product() {
#pragma unroll
    for (int i = 0; i < MI * NI; ++i) fragments[i / NI][i % NI].zero();
  }

  // Adds the products of k in [begin, end); `also(left tile, right tile, k)` sees each step's
  // tiles.
  template <class Also>
  __device__ void run(const Rows<Left>& left, int64_t m, int64_t M, const Rows<Right>& right,
                      int64_t n, int64_t N, int64_t begin, int64_t end, char* shared, Also also) {
    LeftTile left_tile;
    RightTile right_tile;
    const bool any = n < N;  // else only `also` uses the left tiles
    const auto load = [&](int64_t k) {
      kLeftAlongK ? left_tile.load(left, m, M, k, end) : left_tile.load(left, k, end, m, M);
      if (any)
        kRightAlongK ? right_tile.load(right, n, N, k, end) : right_tile.load(right, k, end, n, N);
    };
    load(begin);
    for (int64_t k = begin; k < end; k += BK) {
      char* buffer = shared + (k - begin) / BK % 2 * kStepBytes;
      Left* left_step = reinterpret_cast<Left*>(buffer);
      Right* right_step = reinterpret_cast<Right*>(buffer + LeftTile::kBytes);
      left_tile.store(left_step);
      if (any) right_tile.store(right_step);
      __syncthreads();  // the tiles are complete, and the other buffer is no longer read
      if (k + BK < end) load(k + BK);
      if (any) multiply(left_step, right_step);
      also(left_step, right_step, k);
    }
    __syncthreads();  // the buffers are free for patches
  }

  __device__ void multiply(const Left* left, const Right* right) {
    if constexpr (kTensorCores || kSplit) {
      multiply(left, right, fragments);
    } else {
      Fragment step[MI][NI];
#pragma unroll
      for (int i = 0; i < MI * NI; ++i) step[i / NI][i % NI].zero();
      multiply(left, right, step);
#pragma unroll
      for (int i = 0; i < MI * NI; ++i) fragments[i / NI][i % NI].join(step[i / NI][i % NI]);
    }
  }

  static __device__ void multiply(const Left* left, const Right* right, Fragment (&sums)[MI][NI]) {
#pragma unroll
    for (int k = 0; k < BK; k += Fragment::kStep) {
      typename Fragment::LeftFragment left_fragments[MI];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        const int m = warp_m() + 16 * i;
        Fragment::load(left_fragments[i],
                       left + (kLeftAlongK ? m * LeftTile::kStride + k : k * LeftTile::kStride + m),
                       LeftTile::kStride);
      }
#pragma unroll
      for (int j = 0; j < NI; ++j) {
        typename Fragment::RightFragment right_fragment;
        const int n = warp_n() + 16 * j;
        Fragment::load(
            right_fragment,
            right + (kRightAlongK ? n * RightTile::kStride + k : k * RightTile::kStride + n),
            RightTile::kStride);
#pragma unroll
        for (int i = 0; i < MI; ++i) sums[i][j].add(left_fragments[i], right_fragment);
      }
    }
  }

  // Eight neighboring sums of fragment (i, j) for each lane, through the warp's patch.
  __device__ Pack<float, 8> take(int i, int j, char* shared) const {
    float* patch = reinterpret_cast<float*>(shared) + warp_id() * 16 * kPatchStride;
    __syncwarp();  // the fragment before this one has been read
    fragments[i][j].put(patch);
    __syncwarp();
    Pack<float, 8> out;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      out.v[c] = patch[lane_id() / 2 * kPatchStride + lane_id() % 2 * 8 + c];
    return out;
  }

  // f(i, j, row, first of eight columns) for the lane's share of each fragment.
  template <class F>
  static __device__ void each_fragment(F f) {
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j)
        f(i, j, warp_m() + 16 * i + lane_id() / 2, warp_n() + 16 * j + lane_id() % 2 * 8);
  }

  // Columns n .. of the sums, to the rows that row(m) points to.
  template <class Row>
  __device__ void write(Row row, int64_t m, int64_t M, int64_t n, int64_t N, char* shared) const {
    each_fragment([&](int i, int j, int r, int c) {
      const Pack<float, 8> sums = take(i, j, shared);
      if (m + r >= M) return;
      float* out = row(m + r);
      const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
      for (int q = 0; q < 8; q += 4) {
        const Pack<float, 4> four = {sums.v[q], sums.v[q + 1], sums.v[q + 2], sums.v[q + 3]};
        store_pack(out, n + c + q, N, aligned, four);
      }
    });
  }
};

}  // namespace lora_moe::cuda
