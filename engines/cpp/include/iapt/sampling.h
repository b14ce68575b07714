// Choosing the next token: greedy, or temperature and nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751), with
// the random numbers that NumPy's default generator gives for the same seed, so that C++ and Python choose alike.
#ifndef IAPT_SAMPLING_H_
#define IAPT_SAMPLING_H_

#include <cstdint>
#include <vector>

namespace iapt {

struct Sampling {
  double temperature = 0.0;  // 0 takes the likeliest token; otherwise logits are divided by it
  double top_p = 1.0;        // sample from the smallest set of tokens whose probabilities sum to at least this
  uint64_t seed = 0;         // of a row's random numbers

  // Throws Error: a value is out of its range.
  void check() const;
};

// PCG64 (O'Neill 2014, XSL-RR 128/64) seeded through NumPy's SeedSequence.
class Random {
 public:
  explicit Random(uint64_t seed);
  uint64_t next();
  double uniform();  // in [0, 1), 53 bits

 private:
  unsigned __int128 state_, increment_;
};

// The next token of one row. Throws Error: the logits hold NaN, or no finite largest.
int64_t choose(const std::vector<float>& logits, const Sampling& sampling, Random& random);

}  // namespace iapt

#endif  // IAPT_SAMPLING_H_
