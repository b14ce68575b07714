// Which coefficients belong to which element: how numerator [..., m+1] and denominator [..., n] broadcast against x.
#ifndef IAPT_OP_RATIONAL_LAYOUT_H_
#define IAPT_OP_RATIONAL_LAYOUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "rational.h"

namespace iapt {

constexpr int kMaxRank = 8;

// x as `num_runs` runs of `run` neighbouring elements, each run with one row of coefficients. Plain data, so that a
// CUDA kernel takes it by value.
struct RationalLayout {
  int64_t num_runs = 0;
  int64_t run = 0;
  int32_t num_numerator = 0;    // m + 1
  int32_t num_denominator = 0;  // n
  Form form = Form::kB;
  int32_t rank = 0;  // of the run's index
  int64_t size[kMaxRank] = {};
  int64_t numerator_step[kMaxRank] = {};  // in floats; 0 where the coefficients are shared
  int64_t denominator_step[kMaxRank] = {};
};

IAPT_HOST_DEVICE void coefficient_offsets(const RationalLayout& layout, int64_t run, int64_t* numerator,
                                          int64_t* denominator) {
  int64_t a = 0, b = 0;
  for (int axis = layout.rank - 1; axis >= 0; --axis) {
    const int64_t index = run % layout.size[axis];
    run /= layout.size[axis];
    a += index * layout.numerator_step[axis];
    b += index * layout.denominator_step[axis];
  }
  *numerator = a;
  *denominator = b;
}

// Fills `layout`; returns an empty string, or what does not fit in a sentence.
inline std::string make_layout(const std::vector<int64_t>& x, const std::vector<int64_t>& numerator,
                               const std::vector<int64_t>& denominator, Form form, RationalLayout* layout) {
  const int rank = static_cast<int>(x.size());
  if (rank < 1 || rank > kMaxRank) return "x has " + std::to_string(rank) + " dimensions, expected 1 to 8";
  *layout = RationalLayout{};
  layout->form = form;
  layout->rank = rank - 1;
  layout->run = x.back();
  layout->num_runs = 1;
  for (int axis = 0; axis < rank - 1; ++axis) {
    layout->size[axis] = x[axis];
    layout->num_runs *= x[axis];
  }
  const auto place = [&](const char* name, const std::vector<int64_t>& shape, int64_t most, int32_t* count,
                         int64_t* step) -> std::string {
    const int own = static_cast<int>(shape.size());
    if (own < 1 || own > rank) {
      return std::string(name) + " has " + std::to_string(own) + " dimensions, expected 1 to " + std::to_string(rank);
    }
    if (shape.back() < 1 || shape.back() > most) {
      return std::string(name) + " has " + std::to_string(shape.back()) + " coefficients, expected 1 to " +
             std::to_string(most);
    }
    *count = static_cast<int32_t>(shape.back());
    int64_t stride = shape.back();
    for (int axis = own - 2; axis >= 0; --axis) {
      const int at = axis + rank - own;
      if (shape[axis] != 1 && shape[axis] != x[at]) {
        return std::string(name) + " has size " + std::to_string(shape[axis]) + " where x has " +
               std::to_string(x[at]) + "; expected the same, or 1";
      }
      step[at] = shape[axis] == 1 ? 0 : stride;
      stride *= shape[axis];
    }
    return "";
  };
  std::string problem = place("numerator", numerator, kMaxDegree + 1, &layout->num_numerator, layout->numerator_step);
  if (problem.empty()) {
    problem = place("denominator", denominator, kMaxDegree, &layout->num_denominator, layout->denominator_step);
  }
  if (!problem.empty()) return problem;
  // runs that follow each other with the same coefficients are one longer run
  while (layout->rank > 0 && layout->numerator_step[layout->rank - 1] == 0 &&
         layout->denominator_step[layout->rank - 1] == 0 && layout->num_runs > 0) {
    --layout->rank;
    layout->run *= layout->size[layout->rank];
    layout->num_runs /= layout->size[layout->rank];
  }
  return "";
}

}  // namespace iapt

#endif  // IAPT_OP_RATIONAL_LAYOUT_H_
