// Column sums of a matrix [rows, columns] that a CUDA kernel walks anyway: the bias gradients. A block takes a strip of columns, and with
// blockIdx.y a share of the rows; a second launch adds the shares where there is more than one. No atomics: the order is always the same.
#pragma once

#include "launch.h"

namespace gankern {

constexpr int kStrip = 32;           // columns of a strip: 4 groups of eight, 128 bytes of a float row
constexpr int kStripThreads = 512;   // 128 rows at a time
constexpr std::int64_t kOnePass = 512;  // rows that one block may walk before it pays to split them and launch twice
constexpr std::int64_t kSplitRows = 256, kSplitBlocks = 264;

// Into how many shares work is split that `blocks` blocks would do, `work` rows each: 1, one launch, unless they are too few for the device.
inline std::int64_t shares_of(std::int64_t work, std::int64_t blocks) {
  if (work <= kOnePass || blocks == 0) return 1;
  const std::int64_t by_blocks = ceil_div(kSplitBlocks, blocks), by_work = ceil_div(work, kSplitRows);
  return by_blocks < by_work ? by_blocks : by_work;
}

inline std::int64_t strip_shares(std::int64_t rows, std::int64_t columns) { return shares_of(rows, ceil_div(columns, kStrip)); }

inline dim3 strip_grid(std::int64_t columns, std::int64_t shares) {
  return dim3(static_cast<unsigned>(ceil_div(columns, kStrip)), static_cast<unsigned>(shares));
}

// The whole of a kernel of strip_grid blocks and kStripThreads threads: walk(row, column, at, count, sum) treats the `count` elements from
// `at` = row * columns + column on and adds to their sums. With one share these go to `sums` [columns], else to `partials` [shares, columns].
template <typename T, typename Walk>
__device__ __forceinline__ void sum_strip(T* sums, sum_t<T>* partials, std::int64_t rows, std::int64_t columns, Walk walk) {
  using A = sum_t<T>;
  constexpr int kLanes = kStrip / 8, kWarps = kStripThreads / 32, kRows = kStripThreads / kLanes;
  GK_SHARED(A, partial, [kWarps][kStrip]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kStrip, column = first + thread % kLanes * 8;
  const std::int64_t share = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * share;
  const std::int64_t end = begin + share < rows ? begin + share : rows;
  const int count = elements_left(columns, column);
  A sum[8] = {};
  if (count > 0)
    for (std::int64_t row = begin + thread / kLanes; row < end; row += kRows) walk(row, column, row * columns + column, count, sum);
  for (int offset = 16; offset >= kLanes; offset /= 2)  // lanes that are a multiple of kLanes apart hold the same columns
    for (int k = 0; k < 8; ++k) sum[k] += __shfl_xor_sync(kAllLanes, sum[k], offset);
  if (lane < kLanes)
    for (int k = 0; k < 8; ++k) partial[warp][lane * 8 + k] = sum[k];
  __syncthreads();
  if (thread < kStrip && first + thread < columns) {
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w][thread];
    if (gridDim.y == 1) sums[first + thread] = static_cast<T>(total);
    else partials[blockIdx.y * columns + first + thread] = total;
  }
}

// sums = partials [shares, columns] added up over the shares
template <typename T>
__global__ void sum_shares_kernel(const sum_t<T>* __restrict__ partials, T* __restrict__ sums, std::int64_t shares, std::int64_t columns) {
  for (std::int64_t n = grid_thread(); n < columns; n += grid_stride()) {
    sum_t<T> total = 0;
    for (std::int64_t s = 0; s < shares; ++s) total += partials[s * columns + n];
    sums[n] = static_cast<T>(total);
  }
}

}  // namespace gankern
