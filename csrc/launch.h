// What every .cu file shares: the launch macro, 16-byte access and block sums. With GK_SIM defined a plain C++ compiler builds the same
// kernels against tests/cuda_sim/cuda_sim.h and runs them on the CPU.
#pragma once

#ifdef GK_SIM
#define GK_GRID_CONSTANT
#include "cuda_sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include "math.h"

#ifndef GK_MAX_BLOCKS  // grid-stride kernels launch no more: 8 blocks for each of 132 multiprocessors
#define GK_MAX_BLOCKS 1056
#endif

#ifndef GK_SIM
#define GK_SHARED(type, name, dims) __shared__ type name dims
#define GK_GRID_CONSTANT __grid_constant__  // a parameter struct that is indexed where it lies, not copied to the stack
// Launch on a stream; a kernel name with commas goes in parentheses. Throws if the launch is refused; never waits for the kernel.
#define GK_LAUNCH(kernel, grid, block, stream, ...)          \
  do {                                                       \
    (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__); \
    ::gankern::check_launch(#kernel);                        \
  } while (0)
#endif

namespace gankern {

#ifndef GK_SIM
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": launch must succeed, got: " + cudaGetErrorString(error));
}
#endif

// The accumulation type of a kernel: double for double, float for float, __nv_bfloat16 and __half.
template <typename T>
using sum_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid-stride kernel over n > 0 items.
inline unsigned grid_for(std::int64_t n, int threads) {
  const std::int64_t blocks = ceil_div(n, threads);
  return static_cast<unsigned>(blocks < GK_MAX_BLOCKS ? blocks : GK_MAX_BLOCKS);
}

__device__ __forceinline__ std::int64_t grid_thread() { return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ std::int64_t grid_stride() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

// --- eight consecutive elements, moved 16 bytes at a time when kVector (the address must then be a multiple of 16) -----------------
template <typename T>
struct alignas(16) Eight {
  T v[8];
};

__host__ __device__ inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// The first `count` of eight (all of them when kVector); the others are 0.
template <bool kVector, typename T>
__device__ __forceinline__ void load8(const T* p, int count, sum_t<T> (&out)[8]) {
  if constexpr (kVector) {
    const Eight<T> e = *reinterpret_cast<const Eight<T>*>(p);
    for (int k = 0; k < 8; ++k) out[k] = static_cast<sum_t<T>>(e.v[k]);
  } else {
    for (int k = 0; k < 8; ++k) out[k] = k < count ? static_cast<sum_t<T>>(p[k]) : sum_t<T>(0);
  }
}

template <bool kVector, typename T>
__device__ __forceinline__ void store8(T* p, int count, const sum_t<T> (&in)[8]) {
  if constexpr (kVector) {
    Eight<T> e;
    for (int k = 0; k < 8; ++k) e.v[k] = static_cast<T>(in[k]);
    uint4 words[sizeof(e) / 16];  // stored by the intrinsic: the compiler splits a plain store of the struct into 4-byte ones
    std::memcpy(words, &e, sizeof(e));
    for (unsigned j = 0; j < sizeof(e) / 16; ++j) __stcg(reinterpret_cast<uint4*>(p) + j, words[j]);
  } else {
    for (int k = 0; k < 8; ++k)
      if (k < count) p[k] = static_cast<T>(in[k]);
  }
}

// --- sums in a fixed order: a tree over the lanes of a warp, then over the warps ---------------------------------------------------
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <int K, typename A>
__device__ __forceinline__ void warp_sum(A (&v)[K]) {
  for (int offset = 16; offset > 0; offset /= 2)
    for (int k = 0; k < K; ++k) v[k] += __shfl_down_sync(kAllLanes, v[k], offset);
}

// How many of eight elements from `at` on exist.
__device__ __forceinline__ int elements_left(std::int64_t end, std::int64_t at) { return static_cast<int>(end - at < 8 ? end - at : 8); }

// K sums over a one-dimensional block of whole warps; thread 0 gets them. Once a kernel: the shared memory is not guarded for reuse.
template <int K, typename A>
__device__ __forceinline__ void block_sum(A (&v)[K]) {
  GK_SHARED(A, partial, [32][K]);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  warp_sum<K>(v);
  if (lane == 0)
    for (int k = 0; k < K; ++k) partial[warp][k] = v[k];
  __syncthreads();
  if (warp == 0) {
    for (int k = 0; k < K; ++k) v[k] = lane < warps ? partial[lane][k] : A(0);
    warp_sum<K>(v);
  }
}

}  // namespace gankern

#ifndef GK_SIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace gankern {

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// torch's 16-bit types as CUDA's, which have the same bits
template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceType<torch::headeronly::Half> {
  using type = __half;
};
template <typename T>
using device_t = typename DeviceType<T>::type;

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

}  // namespace gankern
#endif
