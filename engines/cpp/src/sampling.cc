#include "iapt/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <sstream>

#include "iapt/error.h"

namespace iapt {
namespace {

using uint128 = unsigned __int128;

std::string shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// NumPy's SeedSequence without spawn keys: mixes the seed's 32-bit words into a pool of four, then draws words from it.
std::array<uint64_t, 4> seed_words(uint64_t seed) {
  constexpr uint32_t kInitA = 0x43b0d7e5, kMultiplyA = 0x931e8875, kInitB = 0x8b51f9dd, kMultiplyB = 0x58f38ded;
  constexpr uint32_t kMixLeft = 0xca01f9dd, kMixRight = 0x4973f715;
  uint32_t hash = kInitA;
  const auto hashed = [&hash](uint32_t value) {
    value ^= hash;
    hash *= kMultiplyA;
    value *= hash;
    return value ^ (value >> 16);
  };
  const auto mixed = [](uint32_t x, uint32_t y) {
    const uint32_t result = kMixLeft * x - kMixRight * y;
    return result ^ (result >> 16);
  };
  std::array<uint32_t, 4> pool{};
  const std::array<uint32_t, 4> entropy{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  for (size_t i = 0; i < pool.size(); ++i) pool[i] = hashed(entropy[i]);
  for (size_t from = 0; from < pool.size(); ++from) {
    for (size_t to = 0; to < pool.size(); ++to) {
      if (from != to) pool[to] = mixed(pool[to], hashed(pool[from]));
    }
  }
  std::array<uint64_t, 4> words{};
  uint32_t draw = kInitB;
  for (size_t i = 0; i < 8; ++i) {
    uint32_t value = pool[i % pool.size()] ^ draw;
    draw *= kMultiplyB;
    value *= draw;
    value ^= value >> 16;
    words[i / 2] |= static_cast<uint64_t>(value) << (32 * (i % 2));
  }
  return words;
}

// Weights, the likeliest token's being 1, above which tokens are looked at first, and then with less and less.
constexpr float kLeast[] = {1e-2F, 1e-4F, 1e-7F, 0.0F};

// What fp32 can divide by. Below it only the likeliest tokens are left, above it all are equally likely.
constexpr double kTemperatures[] = {1e-30, 1e30};

// The likeliest tokens before which less than `top_p` of the whole is covered, ascending. To sort all would take
// milliseconds, so those that weigh little are left out while the others cover enough.
std::vector<int64_t> nucleus(const std::vector<float>& scaled, const std::vector<float>& weights, double top_p) {
  const double needed = top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int64_t> found;
  for (const float least : kLeast) {
    found.clear();
    double covered = 0.0;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!(weights[i] > least)) continue;
      found.push_back(static_cast<int64_t>(i));
      covered += weights[i];
    }
    if (covered > needed) break;
  }
  std::stable_sort(found.begin(), found.end(), [&](int64_t a, int64_t b) { return scaled[a] > scaled[b]; });
  size_t count = 0;
  for (double covered = 0.0; count < found.size() && covered < needed; ++count) covered += weights[found[count]];
  found.resize(count);
  std::sort(found.begin(), found.end());
  return found;
}

constexpr uint128 kMultiplier = (static_cast<uint128>(2549297995355413924ULL) << 64) | 4865540595714422341ULL;

}  // namespace

void Sampling::check() const {
  if (!(temperature >= 0) || std::isinf(temperature)) {
    throw Error("temperature " + shown(temperature) + " is " +
                (temperature < 0 && !std::isinf(temperature) ? "negative" : "no finite number") +
                "; use 0 for greedy, or a positive number");
  }
  if (!(top_p > 0 && top_p <= 1)) {
    throw Error("top_p " + shown(top_p) + " is out of range; expected more than 0 and at most 1");
  }
}

Random::Random(uint64_t seed) {
  const auto words = seed_words(seed);
  const uint128 start = (static_cast<uint128>(words[0]) << 64) | words[1];
  increment_ = (((static_cast<uint128>(words[2]) << 64) | words[3]) << 1) | 1;
  state_ = increment_ + start;
  state_ = state_ * kMultiplier + increment_;
}

uint64_t Random::next() {
  state_ = state_ * kMultiplier + increment_;
  const uint64_t folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
  const unsigned turn = static_cast<unsigned>(state_ >> 122);
  return (folded >> turn) | (folded << ((64 - turn) & 63));
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

int64_t choose(const std::vector<float>& logits, const Sampling& sampling, Random& random) {
  const bool has_nan = std::any_of(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); });
  const auto best = std::max_element(logits.begin(), logits.end());
  if (has_nan || !std::isfinite(*best)) {
    throw Error("its logits hold NaN or infinity; its weights may be too large for the target's type");
  }
  if (sampling.temperature == 0) return best - logits.begin();
  // as in Python: logits and weights in fp32, sums in fp64, and one is drawn in the order of ids
  const auto temperature = static_cast<float>(std::clamp(sampling.temperature, kTemperatures[0], kTemperatures[1]));
  std::vector<float> scaled(logits.size()), weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) weights[i] = std::exp(scaled[i] = (logits[i] - *best) / temperature);
  std::vector<int64_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  if (sampling.top_p < 1) tokens = nucleus(scaled, weights, sampling.top_p);
  double covered = 0.0;
  std::vector<double> ends;
  ends.reserve(tokens.size());
  for (const int64_t token : tokens) ends.push_back(covered += weights[token]);
  const double needed = std::min(random.uniform() * covered, std::nextafter(covered, 0.0));
  return tokens[std::upper_bound(ends.begin(), ends.end(), needed) - ends.begin()];
}

}  // namespace iapt
