// Input checks of the raw ops. The Python functions refuse bad input with full sentences before they come here;
// these hold the contract for whoever calls torch.ops.gankern.* directly.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace gankern {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline void check(bool good, const char* op, const char* argument, const char* expectation) {
  if (!good) throw std::runtime_error(std::string(op) + ": " + argument + " must " + expectation);
}

inline void check_contiguous(const char* op, const char* argument, const Tensor& t) {
  check(t.is_contiguous(), op, argument, "be contiguous");
}

// The argument has the dtype of `like`, is on its device and is contiguous.
inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, argument, "have the dtype of the first tensor");
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, argument, "be on the device of the first tensor");
  check_contiguous(op, argument, t);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The accumulation type: double for double, float for everything else.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

inline ScalarType accumulate_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// A new contiguous CPU tensor, uninitialised. The direct C call: through the dispatcher it costs 1.5 us more.
inline Tensor empty_on_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kDims = 64;  // as many as PyTorch allows
  int64_t strides[kDims], step = 1;
  check(sizes.size() <= kDims, "gankern", "a tensor", "have at most 64 dimensions");
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Call `f` with a value of the C++ type of a floating dtype: f(double{}), f(float{}) ...
template <typename F>
void dispatch_floating(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: check(false, op, "dtype", "be float64, float32, bfloat16 or float16");
  }
}

}  // namespace gankern
