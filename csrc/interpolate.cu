// interpolate on CUDA: a point on the line between a real and a fake sample. The contract stands in gankern/ops/interpolate.py.
// A group is eight consecutive elements of a sample (fewer at its end): one thread's work.
#include "launch.h"
#include "philox.h"

namespace gankern {
namespace {

constexpr int kThreads = 128;

// eps null: drawn from the seed; each thread draws its sample's again, which costs less than the memory it waits for. used [rows]
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    interpolate_kernel(const T* __restrict__ real, const T* __restrict__ fake, const sum_t<T>* __restrict__ eps, const std::int64_t* __restrict__ seed,
                       T* __restrict__ out, sum_t<T>* __restrict__ used, std::int64_t rows, std::int64_t columns) {
  using A = sum_t<T>;
  const std::int64_t groups = (columns + 7) / 8, total = rows * groups;
  const std::uint64_t key = eps == nullptr ? static_cast<std::uint64_t>(*seed) : 0;
  for (std::int64_t i = grid_thread(); i < total; i += grid_stride()) {
    const std::int64_t row = i / groups, column = (i - row * groups) * 8, at = row * columns + column;
    const int count = columns - column < 8 ? static_cast<int>(columns - column) : 8;
    const A e = eps != nullptr ? eps[row] : static_cast<A>(draw_unit(key, static_cast<std::uint64_t>(row))), rest = A(1) - e;
    A x[8], y[8], v[8];
    load8<kVector>(real + at, count, x);
    load8<kVector>(fake + at, count, y);
    for (int k = 0; k < 8; ++k) v[k] = e * x[k] + rest * y[k];
    store8<kVector>(out + at, count, v);
    if (column == 0) used[row] = e;
  }
}

// --- launcher over raw pointers ------------------------------------------------------------------------------------------------
template <typename T>
void launch_interpolate(const T* real, const T* fake, const sum_t<T>* eps, const std::int64_t* seed, T* out, sum_t<T>* used, std::int64_t rows,
                        std::int64_t columns, cudaStream_t stream) {
  if (rows * columns == 0) return;
  const bool vector = columns % 8 == 0 && aligned16(real) && aligned16(fake) && aligned16(out);
  const unsigned blocks = grid_for(rows * ceil_div(columns, 8), kThreads);
  if (vector) GK_LAUNCH((interpolate_kernel<T, true>), blocks, kThreads, stream, real, fake, eps, seed, out, used, rows, columns);
  else GK_LAUNCH((interpolate_kernel<T, false>), blocks, kThreads, stream, real, fake, eps, seed, out, used, rows, columns);
}

#ifndef GK_SIM
constexpr const char* kOp = "interpolate";

std::tuple<Tensor, Tensor> interpolate(const Tensor& real, const Tensor& fake, const std::optional<Tensor>& eps, const std::optional<Tensor>& seed) {
  check_contiguous(kOp, "real", real);
  check_like(kOp, "fake", fake, real);
  check(real.dim() >= 1 && fake.numel() == real.numel(), kOp, "fake", "have the shape of real, at least one dimension");
  check(eps.has_value() != seed.has_value(), kOp, "eps or seed", "be given, and not both");
  const std::int64_t rows = real.size(0), columns = rows > 0 ? real.numel() / rows : 0;
  const ScalarType dtype = accumulate_dtype(real.scalar_type());
  if (eps.has_value()) {
    check(eps->scalar_type() == dtype && eps->numel() == rows, kOp, "eps", "have one value a sample, in the accumulation dtype");
    check_contiguous(kOp, "eps", *eps);
  } else {
    check(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, kOp, "seed", "be an int64 tensor of one element");
  }
  const Tensor& given = eps.has_value() ? *eps : *seed;
  check(given.is_cuda() && given.get_device_index() == real.get_device_index(), kOp, "eps or seed", "be on the device of real");
  const torch::stable::accelerator::DeviceGuard guard(real.get_device_index());
  Tensor out = torch::stable::empty_like(real), used = torch::stable::new_empty(real, {rows}, dtype);
  dispatch_floating(kOp, real.scalar_type(), [&](auto zero) {
    using T = device_t<decltype(zero)>;
    using A = sum_t<T>;
    launch_interpolate<T>(data<T>(real), data<T>(fake), data_or_null<A>(eps), data_or_null<std::int64_t>(seed), mutable_data<T>(out),
                          mutable_data<A>(used), rows, columns, current_stream(real));
  });
  return {out, used};
}
#endif

}  // namespace

#ifndef GK_SIM
STABLE_TORCH_LIBRARY_IMPL(gankern, CUDA, m) { m.impl("interpolate", TORCH_BOX(&interpolate)); }
#endif

}  // namespace gankern
