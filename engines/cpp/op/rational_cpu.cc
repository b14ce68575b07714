#include "rational_cpu.h"

#include <algorithm>

// One binary for every x86-64: the loader picks the widest vectors that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define IAPT_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define IAPT_VECTORISED
#endif

namespace iapt {
namespace {

constexpr int kWidth = 32;  // values side by side: four AVX2 registers hide the latency of Horner's chain

template <typename T>
inline __attribute__((always_inline)) void evaluate(const RationalLayout& layout, const T* x, const float* a,
                                                    const float* b, T* y, int64_t count) {
  float in[kWidth], out[kWidth];
  while (count > 0) {
    const int64_t now = std::min<int64_t>(count, kWidth);
    if (now == kWidth) {
      for (int i = 0; i < kWidth; ++i) in[i] = to_float(x[i]);
    } else {
      for (int i = 0; i < kWidth; ++i) in[i] = i < now ? to_float(x[i]) : 0.0f;
    }
    rational(in, a, layout.num_numerator, b, layout.num_denominator, layout.form, out);
    if (now == kWidth) {
      for (int i = 0; i < kWidth; ++i) from_float(out[i], y + i);
    } else {
      for (int i = 0; i < now; ++i) from_float(out[i], y + i);
    }
    x += now;
    y += now;
    count -= now;
  }
}

template <typename T>
inline __attribute__((always_inline)) void walk(const RationalLayout& layout, const T* x, const float* numerator,
                                                const float* denominator, T* y, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t run = begin / layout.run;
    const int64_t stop = std::min(end, (run + 1) * layout.run);
    int64_t a = 0, b = 0;
    coefficient_offsets(layout, run, &a, &b);
    evaluate(layout, x + begin, numerator + a, denominator + b, y + begin, stop - begin);
    begin = stop;
  }
}

}  // namespace

IAPT_VECTORISED void rational_cpu(const RationalLayout& layout, const float* x, const float* numerator,
                                  const float* denominator, float* y, int64_t begin, int64_t end) {
  walk(layout, x, numerator, denominator, y, begin, end);
}

IAPT_VECTORISED void rational_cpu(const RationalLayout& layout, const Half* x, const float* numerator,
                                  const float* denominator, Half* y, int64_t begin, int64_t end) {
  walk(layout, x, numerator, denominator, y, begin, end);
}

IAPT_VECTORISED void rational_cpu(const RationalLayout& layout, const BFloat16* x, const float* numerator,
                                  const float* denominator, BFloat16* y, int64_t begin, int64_t end) {
  walk(layout, x, numerator, denominator, y, begin, end);
}

}  // namespace iapt
