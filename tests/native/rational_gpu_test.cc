// The CUDA kernel alone, against the CPU kernel that compiles the same lines: every bit must agree. Prints the time of
// tensors of 1e5 to 1e9 values against the time in which the GPU's memory copies as many bytes. Needs a GPU, else exits
// 77 (skipped).
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
  explicit OnGpu(size_t size) : size_(size) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(size_, 1) * sizeof(T)));
  }
  explicit OnGpu(const std::vector<T>& host) : OnGpu(host.size()) {
    check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnGpu() { cudaFree(data_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  T* get() { return data_; }
  size_t size() const { return size_; }
  std::vector<T> read() {
    std::vector<T> host(size_);
    check(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};

// The values over and over, as often as they fit.
template <typename T>
void fill(OnGpu<T>* target, const std::vector<T>& host) {
  const size_t first = std::min(host.size(), target->size());
  check(cudaMemcpy(target->get(), host.data(), first * sizeof(T), cudaMemcpyHostToDevice));
  for (size_t done = first; done < target->size();) {
    const size_t more = std::min(done, target->size() - done);
    check(cudaMemcpy(target->get() + done, target->get(), more * sizeof(T), cudaMemcpyDeviceToDevice));
    done += more;
  }
}

template <typename Action>
float median_ms(int repeats, Action action) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) action();
  std::vector<float> times(repeats);
  for (float& ms : times) {
    check(cudaEventRecord(begin));
    action();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&ms, begin, end));
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

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

// Bytes a second that a copy within the GPU's memory moves, read and written.
double copy_bandwidth() {
  constexpr size_t kBytes = size_t{1} << 30;
  constexpr int kRepeats = 10;
  OnGpu<char> from(kBytes), to(kBytes);
  check(cudaMemset(from.get(), 1, kBytes));
  const float ms =
      median_ms(kRepeats, [&] { check(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice)); });
  return 2.0 * kBytes / ms * 1e3;
}

// One line for a tensor of `count` values with coefficients of their own in each row of `kWidth`, or shared ones.
template <typename T>
void measure(const char* name, int64_t count, bool per_row, double bandwidth) {
  constexpr int64_t kWidth = 1000;  // the sizes that are measured are multiples
  constexpr int kRepeats = 20;
  const int64_t rows = count / kWidth, sets = per_row ? rows : 1;
  RationalLayout layout;
  const std::string problem = iapt::make_layout({rows, kWidth}, {sets, 6}, {sets, 4}, Form::kB, &layout);
  if (!problem.empty()) {
    std::fprintf(stderr, "%s\n", problem.c_str());
    std::exit(1);
  }
  OnGpu<T> x(count), y(count);
  fill(&x, values<T>(std::min<int64_t>(count, 1 << 20), 1));
  OnGpu<float> a(sets * 6), b(sets * 4);
  fill(&a, std::vector<float>{0.0f, 0.5f, 0.4f, 0.07f, -0.01f, -0.004f});
  fill(&b, std::vector<float>{0.0f, 0.15f, 0.0f, -0.007f});
  const float ms = median_ms(kRepeats, [&] {
    const char* error = iapt::rational_cuda(layout, x.get(), a.get(), b.get(), y.get(), nullptr);
    if (error != nullptr) {
      std::fprintf(stderr, "CUDA: %s\n", error);
      std::exit(1);
    }
  });
  const double floor_ms = (2.0 * count * sizeof(T) + sets * 10.0 * sizeof(float)) / bandwidth * 1e3;
  std::printf("time %s %s %lld %.5f ms, floor %.5f ms\n", name, per_row ? "per-row" : "shared",
              static_cast<long long>(count), ms, floor_ms);
  std::fflush(stdout);
}

template <typename T>
void measure_all(const char* name, double bandwidth) {
  for (const int64_t count : {100000, 1000000, 10000000, 100000000, 1000000000}) {
    size_t free_bytes = 0, total_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &total_bytes));
    if (2.1 * count * sizeof(T) > static_cast<double>(free_bytes)) continue;
    for (const bool per_row : {false, true}) measure<T>(name, count, per_row, bandwidth);
  }
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
  const double bandwidth = copy_bandwidth();
  std::printf("copy %.1f GB/s\n", bandwidth / 1e9);
  measure_all<float>("fp32", bandwidth);
  measure_all<Half>("fp16", bandwidth);
  measure_all<BFloat16>("bf16", bandwidth);
  std::printf(failures == 0 ? "all comparisons agree\n" : "%d comparisons differ\n", failures);
  return failures == 0 ? 0 : 1;
}
