// interpolate on the CPU: a point on the line between a real and a fake sample. The contract stands in gankern/ops/interpolate.py.
#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu.h"
#include "philox.h"

namespace gankern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr const char* kOp = "interpolate";
constexpr int64_t kGrain = 32768;  // elements a thread takes at least

template <typename T>
GK_HD void mix_row(const T* real, const T* fake, T* out, int64_t n, acc_t<T> eps) {
  using A = acc_t<T>;
  const A rest = A(1) - eps;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(eps * static_cast<A>(real[i]) + rest * static_cast<A>(fake[i]));
}

#define GK_MIX(T) \
  GK_CLONES void mix(const T* real, const T* fake, T* out, int64_t n, acc_t<T> eps) { mix_row<T>(real, fake, out, n, eps); }
GK_MIX(double)
GK_MIX(float)
GK_MIX(BFloat16)
GK_MIX(Half)

std::tuple<Tensor, Tensor> interpolate(const Tensor& real, const Tensor& fake, const std::optional<Tensor>& eps, const std::optional<Tensor>& seed) {
  check_contiguous(kOp, "real", real);
  check_like(kOp, "fake", fake, real);
  check(real.dim() >= 1 && fake.numel() == real.numel(), kOp, "fake", "have the shape of real, at least one dimension");
  check(eps.has_value() != seed.has_value(), kOp, "eps or seed", "be given, and not both");
  const int64_t rows = real.size(0), columns = rows > 0 ? real.numel() / rows : 0;
  const ScalarType dtype = accumulate_dtype(real.scalar_type());
  if (eps.has_value()) {
    check(eps->scalar_type() == dtype && eps->numel() == rows && eps->is_cpu(), kOp, "eps", "have one value a sample, in the accumulation dtype");
    check_contiguous(kOp, "eps", *eps);
  } else {
    check(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(), kOp, "seed", "be an int64 tensor of one element");
  }
  Tensor out = torch::stable::empty_like(real), used = empty_on_cpu({rows}, dtype);
  dispatch_floating(kOp, real.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    A* e = mutable_data<A>(used);
    if (eps.has_value()) std::copy_n(data<A>(*eps), rows, e);
    else
      for (int64_t b = 0; b < rows; ++b) e[b] = static_cast<A>(draw_unit(static_cast<uint64_t>(*data<int64_t>(*seed)), static_cast<uint64_t>(b)));
    const T *x = data<T>(real), *y = data<T>(fake);
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows * columns, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / columns, stop = std::min(end, (row + 1) * columns);
        mix(x + begin, y + begin, to + begin, stop - begin, e[row]);
        begin = stop;
      }
    });
  });
  return {out, used};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankern, m) {
  m.def("interpolate(Tensor real, Tensor fake, Tensor? eps, Tensor? seed) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { m.impl("interpolate", TORCH_BOX(&interpolate)); }

}  // namespace gankern
