// gankern._C: importing it loads this library, which registers the CPU ops; the module itself tells only how it was built.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

#define GK_TEXT_(x) #x
#define GK_TEXT(x) GK_TEXT_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "gankern's compiled CPU ops (torch.ops.gankern) and how they were built.";
#if defined(__clang__)
  m.attr("compiler") = std::string("clang ") + __clang_version__;
#else
  m.attr("compiler") = std::string("gcc ") + __VERSION__;
#endif
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
  m.attr("torch_target_version") = GK_TEXT(TORCH_TARGET_VERSION);
  m.attr("built_with_torch") = GK_BUILT_WITH_TORCH;
  m.attr("cuda_arch_list") = GK_CUDA_ARCH_LIST;
}
