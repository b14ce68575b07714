// The CUDA kernel alone, against the CPU kernel that compiles the same lines: every bit must agree. Prints the time
// of a large tensor against the least time in which the GPU's memory can move it. Needs a GPU, else exits 77 (skipped).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "rational_cpu.h"
#include "rational_cuda.h"

namespace {

using iapt::BFloat16;
using iapt::Form;
using iapt::Half;
using iapt::RationalLayout;

int failures = 0;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <typename T>
class OnGpu {
 public:
  explicit OnGpu(const std::vector<T>& host) : size_(host.size()) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(size_, 1) * sizeof(T)));
    check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnGpu() { cudaFree(data_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  T* get() { return data_; }
  std::vector<T> read() {
    std::vector<T> host(size_);
    check(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};

template <typename T>
std::vector<T> values(size_t count, unsigned seed) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {0.0f, -0.0f, 1e-30f, -1e-45f, 9.3f, -70.0f, 65504.0f, 1e30f, -3e38f, inf, -inf, nan};
  std::mt19937 source(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<T> made(count);
  for (size_t i = 0; i < count; ++i) iapt::from_float(i % 7 == 0 ? special[(i / 7) % 12] : normal(source), &made[i]);
  return made;
}

template <typename T>
bool is_nan(T value) {
  const float wide = iapt::to_float(value);
  return wide != wide;
}

template <typename T>
void compare(const char* name, const std::vector<int64_t>& shape, int m, int n, Form form, bool per_row) {
  std::vector<int64_t> a_shape(per_row ? shape.size() : 1, 1), b_shape(a_shape);
  a_shape.back() = m + 1;
  b_shape.back() = n;
  if (per_row) a_shape[0] = b_shape[0] = shape[0];
  RationalLayout layout;
  const std::string problem = iapt::make_layout(shape, a_shape, b_shape, form, &layout);
  if (!problem.empty()) {
    std::fprintf(stderr, "%s\n", problem.c_str());
    std::exit(1);
  }
  const auto x = values<T>(layout.num_runs * layout.run, 1);
  const size_t rows = per_row ? shape[0] : 1;
  auto a = values<float>(rows * (m + 1), 2), b = values<float>(rows * n, 3);
  const auto ordinary = [](std::vector<float>& all) {  // coefficients are finite
    for (size_t i = 0; i < all.size(); i += 7) all[i] = 0.25f * static_cast<float>(i % 5) - 0.5f;
  };
  ordinary(a);
  ordinary(b);
  std::vector<T> wanted(x.size());
  if (!x.empty()) iapt::rational_cpu(layout, x.data(), a.data(), b.data(), wanted.data(), 0, x.size());
  OnGpu<T> gpu_x(x), gpu_y(std::vector<T>(x.size()));
  OnGpu<float> gpu_a(a), gpu_b(b);
  const char* error = iapt::rational_cuda(layout, gpu_x.get(), gpu_a.get(), gpu_b.get(), gpu_y.get(), nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "CUDA: %s\n", error);
    std::exit(1);
  }
  const auto made = gpu_y.read();
  size_t wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const bool same = std::memcmp(&made[i], &wanted[i], sizeof(T)) == 0 || (is_nan(made[i]) && is_nan(wanted[i]));
    wrong += !same;
  }
  if (wrong == 0) return;
  ++failures;
  std::fprintf(stderr, "%s form %c degrees (%d, %d)%s: %zu of %zu values differ\n", name, form == Form::kA ? 'A' : 'B',
               m, n, per_row ? " per row" : "", wrong, x.size());
}

template <typename T>
void compare_all(const char* name) {
  for (const Form form : {Form::kA, Form::kB}) {
    for (int m = 1; m <= iapt::kMaxDegree; ++m) {
      for (int n = 1; n <= iapt::kMaxDegree; ++n) {
        compare<T>(name, {3, 5, 64}, m, n, form, true);
        compare<T>(name, {2, 3, 37}, m, n, form, false);
      }
    }
    compare<T>(name, {0, 5}, 5, 4, form, false);
    compare<T>(name, {70000, 1, 16}, 5, 4, form, true);
  }
}

template <typename T>
void measure(const char* name, double bandwidth) {
  constexpr int64_t kRows = 8192, kWidth = 8192;
  constexpr int kRepeats = 20;
  RationalLayout layout;
  iapt::make_layout({kRows, kWidth}, {6}, {4}, Form::kB, &layout);
  OnGpu<T> x(values<T>(kRows * kWidth, 1)), y(std::vector<T>(kRows * kWidth));
  OnGpu<float> a({0.0f, 0.5f, 0.4f, 0.07f, -0.01f, -0.004f}), b({0.0f, 0.15f, 0.0f, -0.007f});
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) iapt::rational_cuda(layout, x.get(), a.get(), b.get(), y.get(), nullptr);
  check(cudaEventRecord(begin));
  for (int i = 0; i < kRepeats; ++i) iapt::rational_cuda(layout, x.get(), a.get(), b.get(), y.get(), nullptr);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, begin, end));
  const double floor_ms = 2.0 * kRows * kWidth * sizeof(T) / bandwidth * 1e3;
  std::printf("%s: %.3f ms for %ld values; the memory alone needs %.3f ms\n", name, ms / kRepeats,
              static_cast<long>(kRows * kWidth), floor_ms);
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::puts("skipped: this test needs an NVIDIA GPU and its driver");
    return 77;
  }
  compare_all<float>("fp32");
  compare_all<Half>("fp16");
  compare_all<BFloat16>("bf16");
  int clock_khz = 0, bus_bits = 0;
  check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, 0));
  check(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, 0));
  const double bandwidth = 2.0 * clock_khz * 1e3 * bus_bits / 8;  // bytes a second; two transfers a clock
  measure<float>("fp32", bandwidth);
  measure<Half>("fp16", bandwidth);
  measure<BFloat16>("bf16", bandwidth);
  std::printf(failures == 0 ? "all comparisons agree\n" : "%d comparisons differ\n", failures);
  return failures == 0 ? 0 : 1;
}
