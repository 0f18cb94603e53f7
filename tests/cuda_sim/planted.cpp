// Small kernels, right and wrong, for the tests of the simulator itself. Words: the kernel's name, then what it needs.
#include "driver.h"

namespace {

constexpr int kBlock = 64;

// out[b] = sum of a block's 64 inputs: shuffles within the warps, shared memory across
__global__ void sum_kernel(const float* in, float* out) {
  GK_SHARED(float, partial, [kBlock / 32]);
  float v = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xFFFFFFFFu, v, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1];
}

// out [4, 64]: the lane whose value each kind of shuffle brings
__global__ void shuffle_kernel(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = __shfl_sync(0xFFFFFFFFu, t, 5, 8);
  out[kBlock + t] = __shfl_up_sync(0xFFFFFFFFu, t, 3);
  out[2 * kBlock + t] = __shfl_down_sync(0xFFFFFFFFu, t, 3, 16);
  out[3 * kBlock + t] = __shfl_xor_sync(0xFFFFFFFFu, t, 9);
}

// out [4]: a count, a maximum, how many threads won a compare-and-swap, the grid's thread count by two-dimensional indices
__global__ void atomic_kernel(unsigned* out) {
  atomicAdd(&out[0], 1u);
  atomicMax(&out[1], threadIdx.x + 100 * threadIdx.y);
  if (atomicCAS(&out[2], 0u, 1u) == 0u) atomicAdd(&out[3], gridDim.x * gridDim.y * blockDim.x * blockDim.y);
}

__global__ void clear_kernel(unsigned* out) { out[threadIdx.x] = 0; }

__global__ void missing_barrier_kernel(float* out) {
  GK_SHARED(float, s, [kBlock]);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[(threadIdx.x + 1) % kBlock];
}

// The barrier between a round's reads and the next round's writes is missing.
__global__ void missing_second_barrier_kernel(float* out) {
  GK_SHARED(float, s, [kBlock]);
  float v = static_cast<float>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = v;
    __syncthreads();
    v += s[kBlock - 1 - threadIdx.x];
  }
  out[threadIdx.x] = v;
}

__global__ void global_race_kernel(float* out) { out[0] = static_cast<float>(blockIdx.x); }

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void uneven_loop_kernel(float* out) {
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (threadIdx.x % 2 == 1) return;
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 2);
}

__global__ void outside_mask_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 16);
}

__global__ void global_store_kernel(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void shared_store_kernel(float* out) {
  GK_SHARED(float, s, [kBlock]);
  float* p = s;
  p[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void shared_row_kernel(float* out) {
  GK_SHARED(float, s, [2][kBlock]);
  s[0][threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__attribute__((noinline)) void store(float* p, unsigned i) { p[i] = 1; }

__global__ void stack_store_kernel(float* out) {
  float local[4] = {};
  store(local, threadIdx.x);
  out[threadIdx.x] = local[0];
}

__global__ void unwritten_kernel(float* out) {
  GK_SHARED(float, s, [kBlock]);
  if (threadIdx.x < 32 || blockIdx.x == 0) s[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
}

__global__ void misaligned_kernel(float* out) { *reinterpret_cast<float4*>(out + 1) = float4{1, 2, 3, 4}; }

}  // namespace

int main() {
  driver::Job job;
  const std::string name = job.word();
  if (name == "sum") {
    const std::int64_t blocks = job.integer();
    const float* in = job.input<float>(blocks * kBlock);
    float* out = job.output<float>(blocks);
    job.run([&] { GK_LAUNCH(sum_kernel, static_cast<unsigned>(blocks), kBlock, nullptr, in, out); });
  } else if (name == "shuffle") {
    int* out = job.output<int>(4 * kBlock);
    job.run([&] { GK_LAUNCH(shuffle_kernel, 1, kBlock, nullptr, out); });
  } else if (name == "atomic") {
    unsigned* out = job.output<unsigned>(4);
    job.run([&] {
      GK_LAUNCH(clear_kernel, 1, 4, nullptr, out);
      GK_LAUNCH(atomic_kernel, dim3(3, 2), dim3(8, 4), nullptr, out);
    });
  } else if (name == "unwritten") {
    float* out = job.output<float>(2 * kBlock);
    job.run([&] { GK_LAUNCH(unwritten_kernel, 2, kBlock, nullptr, out); });
  } else if (name == "to16") {  // floats to binary16 and to bfloat16
    const std::int64_t n = job.integer();
    const float* in = job.input<float>(n);
    auto* half = job.output<__half>(n);
    auto* bfloat = job.output<__nv_bfloat16>(n);
    job.run([&] {
      for (std::int64_t i = 0; i < n; ++i) half[i] = __float2half(in[i]), bfloat[i] = __float2bfloat16(in[i]);
    });
  } else if (name == "from16") {  // every 16-bit pattern as binary16 and as bfloat16
    float* half = job.output<float>(65536);
    float* bfloat = job.output<float>(65536);
    job.run([&] {
      for (unsigned i = 0; i < 65536; ++i) {
        const std::uint16_t bits = static_cast<std::uint16_t>(i);
        __half h;
        __nv_bfloat16 b;
        std::memcpy(&h, &bits, 2);
        std::memcpy(&b, &bits, 2);
        half[i] = __half2float(h);
        bfloat[i] = __bfloat162float(b);
      }
    });
  } else {
    float* out = job.output<float>(kBlock);
    job.run([&] {
      if (name == "missing_barrier") GK_LAUNCH(missing_barrier_kernel, 1, kBlock, nullptr, out);
      else if (name == "missing_second_barrier") GK_LAUNCH(missing_second_barrier_kernel, 1, kBlock, nullptr, out);
      else if (name == "global_race") GK_LAUNCH(global_race_kernel, 3, 1, nullptr, out);
      else if (name == "divergent_barrier") GK_LAUNCH(divergent_barrier_kernel, 1, kBlock, nullptr, out);
      else if (name == "two_barriers") GK_LAUNCH(two_barriers_kernel, 1, kBlock, nullptr, out);
      else if (name == "uneven_loop") GK_LAUNCH(uneven_loop_kernel, 1, kBlock, nullptr, out);
      else if (name == "divergent_shuffle") GK_LAUNCH(divergent_shuffle_kernel, 1, kBlock, nullptr, out);
      else if (name == "outside_mask") GK_LAUNCH(outside_mask_kernel, 1, kBlock, nullptr, out);
      else if (name == "partial_warp") GK_LAUNCH(shuffle_kernel, 1, 48, nullptr, nullptr);
      else if (name == "global_store") GK_LAUNCH(global_store_kernel, 1, kBlock, nullptr, out);
      else if (name == "shared_store") GK_LAUNCH(shared_store_kernel, 1, kBlock, nullptr, out);
      else if (name == "shared_row") GK_LAUNCH(shared_row_kernel, 1, kBlock, nullptr, out);
      else if (name == "stack_store") GK_LAUNCH(stack_store_kernel, 1, kBlock, nullptr, out);
      else if (name == "misaligned") GK_LAUNCH(misaligned_kernel, 1, 1, nullptr, out);
      else if (name == "large_block") GK_LAUNCH(global_race_kernel, 1, 1025, nullptr, out);
      else if (name == "empty_grid") GK_LAUNCH(global_race_kernel, 0, 1, nullptr, out);
      else driver::Job::stop("unknown kernel");
    });
  }
}
