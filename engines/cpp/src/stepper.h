// How a batch goes through a bundle's graphs: its rows read instructions, then go on by a token each. Two kinds of
// cache, one contract: one that grows by concatenation and one that is written in place.
#ifndef IAPT_SRC_STEPPER_H_
#define IAPT_SRC_STEPPER_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "iapt/runner.h"

namespace iapt {

using Names = std::vector<std::string>;

// What a new row reads.
struct Instruction {
  std::string tenant;
  std::vector<int64_t> tokens;
};
using Instructions = std::vector<Instruction>;

class Stepper {
 public:
  virtual ~Stepper() = default;

  // Reads the instructions of a new batch; `capacity` is the most cache entries that a row will have.
  // Returns logits [B, 1, V].
  virtual Tensor read(const Instructions& rows, int64_t capacity) = 0;
  // Gives every row its next token. Returns logits [B, 1, V] for the tokens after these.
  virtual Tensor step(const std::vector<int64_t>& tokens) = 0;
  // A row has ended: it keeps its number, takes no more cache entries, and what it computes means nothing.
  void leave(size_t row) { running_[row] = false; }
  virtual std::string rational() const = 0;

 protected:
  std::vector<bool> running_;  // the rows of the batch
};

// What both kinds share: the tenants' weights, and which entry of its method's stack each row uses.
class TenantFeeds {
 public:
  TenantFeeds(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
              const RunnerOptions& options);

  // The inputs that depend on the tenants, for `graph`, which may take fewer; `tokens` are input_ids and attention_mask
  // [B, T], from which an encoder makes the prompts of tenants whose method has one.
  Tensors feeds(const GraphSpec& graph, const Names& tenants, const Tensors& tokens) const;

 private:
  void add_prompts(const GraphSpec& graph, const Names& tenants, const Tensors& tokens, Tensors& feeds) const;

  const BundleManifest& manifest_;
  Tensors weights_;
  std::unique_ptr<Runner> encoder_;
};

// The stepper of a target over the cache that is written in place, or over the one that each step concatenates; nothing
// takes the first where target and device have it. Throws Error: the target has no such cache.
std::unique_ptr<Stepper> open_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                      const TargetSpec& target, const RunnerOptions& options,
                                      std::optional<bool> in_place);

Tensor int64_tensor(std::vector<int64_t> shape, const std::vector<int64_t>& values);

}  // namespace iapt

#endif  // IAPT_SRC_STEPPER_H_
