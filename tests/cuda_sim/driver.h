// The talk between a driver program and tests/test_cuda_sim.py. On stdin: a line of words, then the raw bytes of the inputs; on stdout: the raw
// bytes of the outputs, one after another, in the order in which they were made; on stderr how many kernels were launched.
#pragma once

#include <iostream>
#include <memory>
#include <sstream>

#include "cuda_sim.h"

namespace driver {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

class Job {
 public:
  Job() {
    std::string line;
    std::getline(std::cin, line);
    words_.str(line);
  }

  std::string word() {
    std::string w;
    if (!(words_ >> w)) stop("too few words");
    return w;
  }
  std::int64_t integer() { return std::stoll(word()); }
  double number() { return std::strtod(word().c_str(), nullptr); }  // also inf, nan and hexadecimal

  // n values from stdin in a heap block that ends with them and begins `shift` values before them; null if n < 0
  template <typename T>
  T* input(std::int64_t n, std::int64_t shift = 0) {
    if (n < 0) return nullptr;
    T* p = block<T>(n, shift);
    std::cin.read(reinterpret_cast<char*>(p), static_cast<std::streamsize>(static_cast<std::size_t>(n) * sizeof(T)));
    if (!std::cin) stop("too few bytes");
    return p;
  }

  // n values that the kernels write; null if n < 0
  template <typename T>
  T* output(std::int64_t n, std::int64_t shift = 0) {
    if (n < 0) return nullptr;
    T* p = block<T>(n, shift);
    outputs_.push_back({p, static_cast<std::size_t>(n) * sizeof(T)});
    return p;
  }

  // Runs the launches in every order, then writes the outputs.
  void run(const std::function<void()>& work) {
    if (std::cin.peek() != std::char_traits<char>::eof()) stop("too many bytes");
    cuda_sim::in_every_order(outputs_, work);
    for (const cuda_sim::Memory& m : outputs_) std::cout.write(static_cast<const char*>(m.data), static_cast<std::streamsize>(m.bytes));
    std::cout.flush();
    std::cerr << "launches " << cuda_sim::launches / cuda_sim::kOrders << std::endl;
  }

  [[noreturn]] static void stop(const char* why) {
    std::cerr << "driver: " << why << std::endl;
    std::_Exit(71);
  }

 private:
  template <typename T>
  T* block(std::int64_t n, std::int64_t shift) {
    T* p = static_cast<T*>(std::malloc(static_cast<std::size_t>(n + shift) * sizeof(T)));
    blocks_.emplace_back(p);
    return p + shift;
  }

  std::istringstream words_;
  std::vector<std::unique_ptr<void, Free>> blocks_;
  std::vector<cuda_sim::Memory> outputs_;
};

// Calls f with a value of the type that the word names.
template <typename F>
void with_type(const std::string& dtype, F&& f) {
  if (dtype == "float64") f(double{});
  else if (dtype == "float32") f(float{});
  else if (dtype == "bfloat16") f(__nv_bfloat16{});
  else if (dtype == "float16") f(__half{});
  else Job::stop("unknown dtype");
}

}  // namespace driver
