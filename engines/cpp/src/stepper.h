// How a batch goes through a bundle's graphs: reading instructions, then one token a row and step. Two kinds of cache
// stand behind it, one that grows by concatenation and one that is written in place.
#ifndef IAPT_SRC_STEPPER_H_
#define IAPT_SRC_STEPPER_H_

#include <memory>
#include <string>
#include <vector>

#include "iapt/runner.h"

namespace iapt {

using Prompts = std::vector<std::vector<int64_t>>;
using Names = std::vector<std::string>;

class Stepper {
 public:
  virtual ~Stepper() = default;

  // Reads the instructions of a new batch; `capacity` is the most cache entries that a row will have.
  // Returns logits [B, 1, V].
  virtual Tensor prefill(const Prompts& prompts, const Names& tenants, int64_t capacity) = 0;
  // One step of the batch for one token a row. Returns logits [B, 1, V].
  virtual Tensor decode(const std::vector<int64_t>& tokens) = 0;
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

  // The inputs that depend on the tenants, for `graph`, which may take fewer; `tokens` are input_ids and attention_mask [B, T], from which an
  // encoder makes the prompts of tenants whose method has one.
  Tensors feeds(const GraphSpec& graph, const Names& tenants, const Tensors& tokens) const;

 private:
  void add_prompts(const GraphSpec& graph, const Names& tenants, const Tensors& tokens, Tensors& feeds) const;

  const BundleManifest& manifest_;
  Tensors weights_;
  std::unique_ptr<Runner> encoder_;
};

std::unique_ptr<Stepper> concatenating_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                               const TargetSpec& target, const RunnerOptions& options);
std::unique_ptr<Stepper> in_place_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                          const TargetSpec& target, const RunnerOptions& options);

Tensor int64_tensor(std::vector<int64_t> shape, const std::vector<int64_t>& values);

}  // namespace iapt

#endif  // IAPT_SRC_STEPPER_H_
