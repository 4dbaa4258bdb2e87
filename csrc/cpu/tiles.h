// Register blocking of the products of rows.
#pragma once

#include <algorithm>

#include "pairs.h"

namespace lora_moe {

// A tile's sums and operands exactly fill the registers, 32 or 16 of them.
constexpr int kTileRows = kVectorBytes == 64 ? 6 : 4;
constexpr int kTileColumns = kVectorBytes == 64 ? 4 : 2;  // rows of a; vectors of a row

// Long sums are taken in runs of this many steps, each starting from zero: fewer roundings at full
// magnitude, and a tile's part of its rows stays in the first-level cache.
constexpr int64_t kRun = 64;

// Rows per tile for n rows, such that no tile is much smaller than the others.
constexpr int64_t tile_rows(int64_t n) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  return n == 0 ? 1 : (n + tiles - 1) / tiles;
}

// f.template operator()<M>() with M = rows <= kTileRows, a constant.
template <int M = kTileRows, class F>
LORA_MOE_INLINE void with_rows(int64_t rows, F f) {
  if constexpr (M > 1)
    if (rows < M) return with_rows<M - 1>(rows, f);
  f.template operator()<M>();
}

}  // namespace lora_moe
