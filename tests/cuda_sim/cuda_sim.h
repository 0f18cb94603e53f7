// Runs CUDA kernels on the CPU, for tests: a plain C++ compiler builds the kernels' own source against this header (GK_SIM).
//
// Each CUDA thread is a fiber; the blocks of a grid run one after another. Within a block the threads run one at a time, each until
// it waits (barrier, warp shuffle) or returns. The rules are stricter than the hardware's:
//   - __syncthreads: all threads of the block wait at the same source line, none has returned;
//   - shuffles and __syncwarp: all lanes of the mask wait at the same source line with the same mask; a lane of the mask that has returned or does
//     not exist, or a value taken from a lane outside the mask, is an error;
//   - __shared__ arrays (GK_SHARED) are heap blocks of their own, filled with 0xFF (NaN) at the start of each block, so that AddressSanitizer sees
//     a store out of bounds and a read of what nobody wrote shows;
//   - in_every_order runs the work with the threads and blocks in several orders: where two orders leave different bytes, there is a race.
// An error prints one line to stderr and ends the process with status 70; what the sanitizers find ends it with theirs.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define GK_SHARED(type, name, dims)   \
  typedef type name##_shared_t dims; \
  name##_shared_t& name = *static_cast<name##_shared_t*>(::cuda_sim::shared_variable(#name, __FILE__, __LINE__, sizeof(name##_shared_t)))

// The arguments are copied at the launch, as the hardware does.
#define GK_LAUNCH(kernel, grid, block, stream, ...)                                      \
  do {                                                                                   \
    (void)(stream);                                                                      \
    ::cuda_sim::launch(#kernel, (grid), (block), [=] { (kernel)(__VA_ARGS__); });        \
  } while (0)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : uint3{x_, y_, z_} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
using cudaStream_t = void*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_sim {

// --- fibers ------------------------------------------------------------------------------------------------------------------------
enum class State { ready, barrier, shuffle, returned };

// Where a stack goes on: frame pointer, code and stack pointer.
struct Place {
  void* words[5];
};

struct Fiber {
  ucontext_t context;  // of its very start
  Place place{};
  char* stack = nullptr;
  bool started = false;
  void* fake_stack = nullptr;
  State state = State::ready;
  uint3 index{};
  // where it waits, and for a shuffle: who takes part, whose value it wants, what it gives and gets
  const char* file = "";
  int line = 0;
  unsigned mask = 0;
  int source = 0;
  std::uint64_t value = 0, received = 0;
};

struct Shared {
  const char* file;
  int line;
  std::size_t bytes;
  void* data;
};

constexpr std::size_t kStack = 64 * 1024, kSharedLimit = 48 * 1024;
constexpr int kWarp = 32, kOrders = 3;

inline const char* kernel_name = "";
inline const std::function<void()>* body = nullptr;
inline std::vector<Fiber> fibers;  // of the running block; the stacks are kept
inline std::size_t current = 0;    // the fiber that runs
inline std::vector<Shared> shared_variables;
inline Place scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline std::size_t scheduler_stack_size = 0;
inline int order = 0;  // 0 forward, 1 reverse, 2 drawn anew after every wait
inline std::mt19937 generator;
inline std::uint64_t launches = 0;

[[noreturn]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda_sim: kernel %s, block (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(70);
}

// swapcontext would make a system call and clear the shadow memory of a whole stack at every switch. The builtins do neither, and outside
// AddressSanitizer's eyes the jump leaves the red zones of the frames that it passes as they are.
[[gnu::noinline, gnu::no_sanitize_address]] inline void jump(Place& from, Place& to) {
  if (__builtin_setjmp(from.words) == 0) __builtin_longjmp(to.words, 1);
}

[[gnu::noinline, gnu::no_sanitize_address]] inline void start(Place& from, const ucontext_t& to) {
  if (__builtin_setjmp(from.words) == 0) setcontext(&to);
}

// Called by a fiber: give control back until the scheduler has released it.
inline Fiber& wait_as(State state, const char* file, int line) {
  Fiber& self = fibers[current];
  self.state = state;
  self.file = file;
  self.line = line;
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_size);
  jump(self.place, scheduler);
  __sanitizer_finish_switch_fiber(fibers[current].fake_stack, &scheduler_stack, &scheduler_stack_size);
  return fibers[current];
}

// A fiber's whole life: one thread of a block after another.
inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body)();
    wait_as(State::returned, "", 0);
  }
}

inline void resume(std::size_t i) {
  Fiber& f = fibers[current = i];
  threadIdx = f.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStack);
  if (f.started) jump(scheduler, f.place);
  else f.started = true, start(scheduler, f.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// --- one block ---------------------------------------------------------------------------------------------------------------------
inline std::string describe(std::size_t i) {
  const Fiber& f = fibers[i];
  const std::string name = "thread " + std::to_string(i), place = std::string(f.file) + ":" + std::to_string(f.line);
  if (f.state == State::returned) return name + " has returned";
  return name + (f.state == State::barrier ? " waits at __syncthreads " : " waits at a warp operation ") + place;
}

inline bool same_place(const Fiber& a, const Fiber& b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// Exchange the values of every group of lanes that has gathered. Returns whether there was one.
inline bool release_shuffles(std::size_t threads) {
  bool released = false;
  for (std::size_t i = 0; i < threads; ++i) {
    if (fibers[i].state != State::shuffle) continue;
    const Fiber first = fibers[i];
    const std::size_t base = i / kWarp * kWarp;
    bool gathered = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((first.mask >> lane & 1u) == 0) continue;
      const std::size_t j = base + static_cast<std::size_t>(lane);
      if (j >= threads) fail("divergence: %s with lane %d in its mask, which does not exist", describe(i).c_str(), lane);
      const Fiber& other = fibers[j];
      if (other.state == State::returned) fail("divergence: %s, but %s", describe(i).c_str(), describe(j).c_str());
      gathered = gathered && other.state == State::shuffle && other.mask == first.mask && same_place(other, first);
    }
    if (!gathered) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((first.mask >> lane & 1u) == 0) continue;
      Fiber& to = fibers[base + static_cast<std::size_t>(lane)];
      if ((first.mask >> to.source & 1u) == 0) fail("%s and takes the value of lane %d, which is not in the mask", describe(i).c_str(), to.source);
      to.received = fibers[base + static_cast<std::size_t>(to.source)].value;
    }
    for (int lane = 0; lane < kWarp; ++lane)
      if ((first.mask >> lane & 1u) != 0) fibers[base + static_cast<std::size_t>(lane)].state = State::ready;
    released = true;
  }
  return released;
}

// Nobody can run: release the barrier if all wait at it, end the block (false) if all have returned, else it is an error.
inline bool release_barrier(std::size_t threads) {
  for (std::size_t i = 1; i < threads; ++i) {
    const Fiber &a = fibers[0], &b = fibers[i];
    const bool together = a.state == b.state && a.state != State::shuffle && (a.state == State::returned || same_place(a, b));
    if (!together) fail("divergence: %s, but %s", describe(0).c_str(), describe(i).c_str());
  }
  if (fibers[0].state == State::shuffle) fail("divergence: %s with a mask that never gathers", describe(0).c_str());
  if (fibers[0].state == State::returned) return false;
  for (std::size_t i = 0; i < threads; ++i) fibers[i].state = State::ready;
  return true;
}

inline void arrange(std::vector<std::size_t>& items) {
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order == 2) std::shuffle(items.begin(), items.end(), generator);
}

inline void run_block() {
  const std::size_t threads = static_cast<std::size_t>(blockDim.x) * blockDim.y * blockDim.z;
  if (fibers.size() < threads) fibers.resize(threads);
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    if (f.stack == nullptr) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) fail("no memory for the stacks");
      f.stack = static_cast<char*>(memory);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack;
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
    f.state = State::ready;
    const unsigned n = static_cast<unsigned>(i);
    f.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
  }
  do {
    std::vector<std::size_t> ready;
    for (std::size_t i = 0; i < threads; ++i)
      if (fibers[i].state == State::ready) ready.push_back(i);
    arrange(ready);
    for (const std::size_t i : ready) resume(i);
  } while (release_shuffles(threads) || release_barrier(threads));
  for (const Shared& s : shared_variables) std::free(s.data);
  shared_variables.clear();
}

// --- what a kernel calls -----------------------------------------------------------------------------------------------------------
inline void* shared_variable(const char* name, const char* file, int line, std::size_t bytes) {
  std::size_t total = bytes;
  for (const Shared& s : shared_variables) {
    if (s.line == line && s.bytes == bytes && std::strcmp(s.file, file) == 0) return s.data;
    total += s.bytes;
  }
  if (total > kSharedLimit) fail("shared memory must be at most %zu bytes, got %zu with %s", kSharedLimit, total, name);
  void* data = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
  std::memset(data, 0xFF, bytes);
  __asan_poison_memory_region(static_cast<char*>(data) + bytes, (bytes + 15) / 16 * 16 - bytes);
  shared_variables.push_back({file, line, bytes, data});
  return data;
}

template <typename T>
T exchange(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Fiber& self = fibers[current];
  if ((mask >> (current % kWarp) & 1u) == 0) fail("thread %zu is not in the mask of its warp operation %s:%d", current, file, line);
  self.mask = mask;
  self.source = source;
  std::memcpy(&self.value, &value, sizeof value);
  wait_as(State::shuffle, file, line);
  std::memcpy(&value, &self.received, sizeof value);
  return value;
}

inline void launch(const char* name, dim3 grid, dim3 block, const std::function<void()>& kernel) {
  kernel_name = name;
  blockIdx = {0, 0, 0};
  ++launches;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z, blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("a block must have 1 to 1024 threads, got (%u, %u, %u)", block.x, block.y, block.z);
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    fail("a grid must have blocks within the limits, got (%u, %u, %u)", grid.x, grid.y, grid.z);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  std::vector<std::size_t> all(blocks);
  for (std::size_t i = 0; i < blocks; ++i) all[i] = i;
  arrange(all);
  for (const std::size_t i : all) {
    const unsigned n = static_cast<unsigned>(i);
    blockIdx = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    run_block();
  }
}

// --- races -------------------------------------------------------------------------------------------------------------------------
struct Memory {
  void* data;
  std::size_t bytes;
};

// Runs `work` in kOrders orders on outputs filled with 0xFF each time; fails unless they end up the same. They keep the last run's values.
inline void in_every_order(const std::vector<Memory>& outputs, const std::function<void()>& work) {
  std::vector<std::vector<char>> first;
  for (order = 0; order < kOrders; ++order) {
    generator.seed(static_cast<unsigned>(order));
    for (const Memory& m : outputs)
      if (m.bytes > 0) std::memset(m.data, 0xFF, m.bytes);
    work();
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      const char* bytes = static_cast<const char*>(outputs[k].data);
      if (order == 0) first.emplace_back(bytes, bytes + outputs[k].bytes);
      else if (!std::equal(first[k].begin(), first[k].end(), bytes))
        fail("race: output %zu depends on the order in which threads run (order %d)", k, order);
    }
  }
}

// --- 16-bit numbers ----------------------------------------------------------------------------------------------------------------
inline std::uint32_t bits_of(float f) {
  std::uint32_t b;
  std::memcpy(&b, &f, sizeof b);
  return b;
}

inline float float_of(std::uint32_t b) {
  float f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}

// float to binary16, to nearest, ties to even
inline std::uint16_t to_half(float f) {
  const std::uint32_t all = bits_of(f), sign = all >> 16 & 0x8000u, b = all & 0x7FFFFFFFu;
  std::uint32_t h;
  if (b > 0x7F800000u) h = 0x7FFFu;                                                      // NaN
  else if (b >= 0x477FF000u) h = 0x7C00u;                                                // 65520 and more round to infinity
  else if (b < 0x38800000u) h = bits_of(float_of(b) + 0.5f) - bits_of(0.5f);             // below 2^-14: 0.5 has the ulp of a subnormal half
  else h = (b - ((127u - 15u) << 23) + 0xFFFu + (b >> 13 & 1u)) >> 13;
  return static_cast<std::uint16_t>(sign | h);
}

inline float from_half(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, b = static_cast<std::uint32_t>(h & 0x7FFFu) << 13;
  if (b >= 0x7C00u << 13) return float_of(sign | 0x7F800000u | b);
  return float_of(sign | bits_of(float_of(b) * 0x1p112f));
}

inline std::uint16_t to_bfloat16(float f) {
  const std::uint32_t b = bits_of(f);
  return static_cast<std::uint16_t>((b & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : (b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
}

inline float from_bfloat16(std::uint16_t h) { return float_of(static_cast<std::uint32_t>(h) << 16); }

}  // namespace cuda_sim

struct __half {
  std::uint16_t bits;
  __half() = default;
  explicit __half(float f) : bits(cuda_sim::to_half(f)) {}
  explicit operator float() const { return cuda_sim::from_half(bits); }
};
struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) : bits(cuda_sim::to_bfloat16(f)) {}
  explicit operator float() const { return cuda_sim::from_bfloat16(bits); }
};
inline float __half2float(__half h) { return static_cast<float>(h); }
inline __half __float2half(float f) { return __half(f); }
inline float __bfloat162float(__nv_bfloat16 h) { return static_cast<float>(h); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }

// --- CUDA's functions --------------------------------------------------------------------------------------------------------------
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_sim::wait_as(cuda_sim::State::barrier, file, line);
}

inline int cuda_sim_lane() { return static_cast<int>(cuda_sim::current % cuda_sim::kWarp); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_sim::exchange(mask, 0, cuda_sim_lane(), file, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_sim::exchange(mask, v, cuda_sim_lane() / width * width + source % width, file, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int lane = cuda_sim_lane(), step = static_cast<int>(delta);
  return cuda_sim::exchange(mask, v, lane % width + step < width ? lane + step : lane, file, line);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int lane = cuda_sim_lane(), step = static_cast<int>(delta);
  return cuda_sim::exchange(mask, v, lane % width >= step ? lane - step : lane, file, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int lane = cuda_sim_lane(), source = lane ^ other;
  return cuda_sim::exchange(mask, v, source / width > lane / width ? lane : source, file, line);
}

// Integers only: sums of floating-point numbers by atomics would depend on the order.
template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* p, T v) {
  const T old = *p;
  *p = static_cast<T>(old + v);
  return old;
}

template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}

template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}

template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}

inline void __threadfence() {}
