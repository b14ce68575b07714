#include "stepper.h"

#include <algorithm>
#include <cstring>

#include "iapt/graphs.h"
#include "tenants.h"

namespace iapt {
namespace {

constexpr const char* kPast = "past_key_values.";
constexpr const char* kPresent = "present.";

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }
bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}
std::string present_of(const std::string& past) { return kPresent + past.substr(std::strlen(kPast)); }

// Rows of a host tensor [B, ...].
Tensor rows_of(const Tensor& tensor, const std::vector<size_t>& rows) {
  auto shape = tensor.shape;
  shape[0] = static_cast<int64_t>(rows.size());
  Tensor made(tensor.dtype, shape);
  const size_t width = tensor.shape[0] == 0 ? 0 : tensor.num_bytes() / static_cast<size_t>(tensor.shape[0]);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(made.as<char>() + i * width, tensor.as<char>() + rows[i] * width, width);
  }
  return made;
}

size_t longest_of(const Instructions& rows) {
  size_t longest = 0;
  for (const auto& row : rows) longest = std::max(longest, row.tokens.size());
  return longest;
}

Names tenants_of(const Instructions& rows) {
  Names names;
  for (const auto& row : rows) names.push_back(row.tenant);
  return names;
}

// input_ids and attention_mask [B, T], padded on the left.
Tensors left_padded(const Instructions& rows, int64_t pad) {
  const size_t length = longest_of(rows);
  const std::vector<int64_t> shape{static_cast<int64_t>(rows.size()), static_cast<int64_t>(length)};
  Tensor ids("int64", shape), mask("int64", shape);
  std::fill_n(ids.as<int64_t>(), ids.count(), pad);
  for (size_t row = 0; row < rows.size(); ++row) {
    const auto& tokens = rows[row].tokens;
    const size_t at = row * length + length - tokens.size();
    std::copy(tokens.begin(), tokens.end(), ids.as<int64_t>() + at);
    std::fill_n(mask.as<int64_t>() + at, tokens.size(), 1);
  }
  return {{"input_ids", ids}, {"attention_mask", mask}};
}

// The cache grows by one entry a step: standard operators, any runtime.
class ConcatenatedStepper final : public Stepper {
 public:
  ConcatenatedStepper(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
                      const StepGraphs& graphs, const RunnerOptions& options)
      : manifest_(manifest),
        graphs_(graphs),
        tenant_feeds_(bundle, manifest, target, options),
        reader_(open_runner(bundle, target, *graphs.reads, options)),
        stepper_(open_runner(bundle, target, *graphs.continues, options)) {}

  std::string rational() const override { return reader_->rational(); }

  Tensor read(const Instructions& rows, int64_t) override {
    tenants_ = tenants_of(rows);
    running_.assign(rows.size(), true);
    Tensors feeds = left_padded(rows, manifest_.backbone.pad_token_id);
    feeds.merge(tenant_feeds_.feeds(*graphs_.reads, tenants_, feeds));
    const int64_t slots = manifest_.num_slots();
    const auto length = static_cast<int64_t>(longest_of(rows));
    masks_.assign(rows.size(), {});
    for (size_t row = 0; row < rows.size(); ++row) {  // a tenant with fewer prompts leaves the first slots empty
      masks_[row].assign(static_cast<size_t>(slots), 0);
      std::fill_n(masks_[row].rbegin(), manifest_.prompt_length(rows[row].tenant), 1);
      masks_[row].resize(static_cast<size_t>(slots + length) - rows[row].tokens.size(), 0);
      masks_[row].resize(static_cast<size_t>(slots + length), 1);
    }
    return keep_cache(reader_->infer(feeds));
  }

  Tensor step(const std::vector<int64_t>& tokens) override {
    const auto batch = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> all, positions;
    for (size_t row = 0; row < masks_.size(); ++row) {
      auto& mask = masks_[row];
      mask.push_back(running_[row] ? 1 : 0);
      all.insert(all.end(), mask.begin(), mask.end());
      positions.push_back(std::count(mask.begin(), mask.end(), 1) - 1);
    }
    Tensors feeds = cache_;
    feeds["input_ids"] = int64_tensor({batch, 1}, tokens);
    feeds["attention_mask"] = int64_tensor({batch, static_cast<int64_t>(masks_[0].size())}, all);
    feeds["position_ids"] = int64_tensor({batch, 1}, positions);
    feeds.merge(tenant_feeds_.feeds(*graphs_.continues, tenants_, {}));
    return keep_cache(stepper_->infer(feeds));
  }

 private:
  // Renames present.N.* to the next step's past_key_values.N.*; returns the logits.
  Tensor keep_cache(Tensors outputs) {
    cache_.clear();
    for (auto& [name, tensor] : outputs) {
      if (starts_with(name, kPresent)) cache_[kPast + name.substr(std::strlen(kPresent))] = std::move(tensor);
    }
    return outputs.at("logits");
  }

  const BundleManifest& manifest_;
  StepGraphs graphs_;
  TenantFeeds tenant_feeds_;
  std::unique_ptr<Runner> reader_, stepper_;
  Names tenants_;
  std::vector<std::vector<int64_t>> masks_;  // of every row over the cache, prompt slots first
  Tensors cache_;
};

// One graph for both kinds of step, or one for each; a row stands [its prompt slots | its tokens | padding], and its
// cache entries where they are counted. Keys and values are written into buffers that stay where they are.
class InPlaceStepper final : public Stepper {
 public:
  InPlaceStepper(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
                 const StepGraphs& graphs, const RunnerOptions& options)
      : manifest_(manifest),
        graph_(*graphs.reads),
        tenant_feeds_(bundle, manifest, target, options),
        reader_(open_runner(bundle, target, graph_, options)),
        stepper_(graphs.continues == graphs.reads ? reader_ : open_runner(bundle, target, *graphs.continues, options)) {
  }

  std::string rational() const override { return reader_->rational(); }

  Tensor read(const Instructions& rows, int64_t capacity) override {
    const size_t batch = rows.size();
    tenants_ = tenants_of(rows);
    running_.assign(batch, true);
    lengths_.clear();
    for (const auto& row : rows) {
      lengths_.push_back(manifest_.prompt_length(row.tenant) + static_cast<int64_t>(row.tokens.size()));
    }
    const int64_t length = *std::max_element(lengths_.begin(), lengths_.end());
    std::vector<int64_t> ids(batch * length, manifest_.backbone.pad_token_id), places(batch * length);
    for (size_t row = 0; row < batch; ++row) {
      const auto& tokens = rows[row].tokens;
      const int64_t slots = lengths_[row] - static_cast<int64_t>(tokens.size());
      std::copy(tokens.begin(), tokens.end(), ids.begin() + row * length + slots);
      for (int64_t place = 0; place < length; ++place) places[row * length + place] = place;
    }
    make_buffers(static_cast<int64_t>(batch), std::max(capacity, length));
    weights_ = tenant_feeds_.feeds(graph_, tenants_, left_padded(rows, manifest_.backbone.pad_token_id));
    return run(ids, places, length, true);
  }

  Tensor step(const std::vector<int64_t>& tokens) override {
    std::vector<int64_t> places;
    for (size_t row = 0; row < lengths_.size(); ++row) {  // the new entry stands after the last one
      if (running_[row]) ++lengths_[row];
      places.push_back(lengths_[row] - 1);
    }
    return run(tokens, places, 1, false);
  }

 private:
  Tensor run(const std::vector<int64_t>& ids, const std::vector<int64_t>& places, int64_t length, bool reads) {
    const auto batch = static_cast<int64_t>(lengths_.size());
    Tensors feeds = weights_;
    feeds["input_ids"] = int64_tensor({batch, length}, ids);
    feeds["position_ids"] = int64_tensor({batch, length}, places);
    Tensor last("int32", {batch}), total("int32", {}), flag("bool", {});
    for (int64_t row = 0; row < batch; ++row) last.as<int32_t>()[row] = static_cast<int32_t>(lengths_[row] - 1);
    *total.as<int32_t>() = static_cast<int32_t>(*std::max_element(lengths_.begin(), lengths_.end()));
    *flag.as<bool>() = reads;
    feeds["seqlens_k"] = last;
    feeds["total_sequence_length"] = total;
    feeds["reads_instruction"] = flag;
    Tensors into;
    for (const auto& [name, buffer] : buffers_) {
      feeds[name] = buffer;
      into[present_of(name)] = buffer;
    }
    return (reads ? reader_ : stepper_)->infer(feeds, into).at("logits");
  }

  // Zeros [B, H, C, K] for every layer's keys and values.
  void make_buffers(int64_t batch, int64_t capacity) {
    buffers_.clear();
    for (const auto& input : graph_.inputs) {
      if (!starts_with(input.name, kPast)) continue;
      std::vector<int64_t> shape;
      for (const Size& size : input.shape) {
        const auto* name = std::get_if<std::string>(&size);
        shape.push_back(name == nullptr ? std::get<int64_t>(size) : *name == "batch" ? batch : capacity);
      }
      buffers_[input.name] = reader_->zeros(input.dtype, shape);
    }
  }

  const BundleManifest& manifest_;
  const GraphSpec& graph_;
  TenantFeeds tenant_feeds_;
  std::shared_ptr<Runner> reader_, stepper_;  // one and the same where one graph serves for both
  Names tenants_;
  std::vector<int64_t> lengths_;  // cache entries of every row
  Tensors weights_, buffers_;
};

}  // namespace

Tensor int64_tensor(std::vector<int64_t> shape, const std::vector<int64_t>& values) {
  Tensor made("int64", std::move(shape));
  std::copy(values.begin(), values.end(), made.as<int64_t>());
  return made;
}

TenantFeeds::TenantFeeds(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
                         const RunnerOptions& options)
    : manifest_(manifest), weights_(load_tenants(bundle, manifest, target)) {
  const auto encoder = target.graphs.find(std::string(kEncoder));
  if (encoder != target.graphs.end()) encoder_ = open_runner(bundle, target, encoder->second, options);
}

Tensors TenantFeeds::feeds(const GraphSpec& graph, const Names& tenants, const Tensors& tokens) const {
  Tensors feeds;
  const auto batch = static_cast<int64_t>(tenants.size());
  for (const auto& method : manifest_.methods) {
    const auto own = manifest_.tenants_of(method.name);
    std::vector<int64_t> index;
    for (const auto& tenant : tenants) {
      const auto found = std::find_if(own.begin(), own.end(), [&](const auto* spec) { return spec->name == tenant; });
      index.push_back(found == own.end() ? -1 : found - own.begin());
    }
    feeds[method.name + ".tenant_index"] = int64_tensor({batch}, index);
  }
  feeds.insert(weights_.begin(), weights_.end());
  if (encoder_ && !tokens.empty()) add_prompts(graph, tenants, tokens, feeds);
  return feeds;
}

// METHOD.prompts [B, P, D] of the rows whose method computes its prompts beforehand; zeros for the others.
void TenantFeeds::add_prompts(const GraphSpec& graph, const Names& tenants, const Tensors& tokens,
                              Tensors& feeds) const {
  for (const auto& input : graph.inputs) {
    if (!ends_with(input.name, ".prompts")) continue;
    const std::string method = input.name.substr(0, input.name.size() - std::strlen(".prompts"));
    std::vector<int64_t> shape{static_cast<int64_t>(tenants.size())};
    for (size_t axis = 1; axis < input.shape.size(); ++axis) shape.push_back(std::get<int64_t>(input.shape[axis]));
    Tensor prompts(input.dtype, shape);
    std::vector<size_t> own;
    for (size_t row = 0; row < tenants.size(); ++row) {
      if (manifest_.tenant(tenants[row]).method == method) own.push_back(row);
    }
    if (!own.empty()) {
      Tensors given = weights_;
      for (const auto& [name, tensor] : tokens) given[name] = rows_of(tensor, own);
      for (const auto& [name, tensor] : feeds) {
        if (ends_with(name, ".tenant_index")) given[name] = rows_of(tensor, own);
      }
      const Tensor made = cast(encoder_->infer(given).at("prompts"), input.dtype);
      const size_t width = prompts.num_bytes() / tenants.size();
      for (size_t i = 0; i < own.size(); ++i) {
        std::memcpy(prompts.as<char>() + own[i] * width, made.as<char>() + i * width, width);
      }
    }
    feeds[input.name] = prompts;
  }
}

std::unique_ptr<Stepper> open_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                      const TargetSpec& target, const RunnerOptions& options,
                                      std::optional<bool> in_place) {
  if (in_place.value_or(true)) {
    const auto graphs = step_graphs(target.graphs, true, options.device);
    if (graphs) return std::make_unique<InPlaceStepper>(bundle, manifest, target, *graphs, options);
  }
  if (!in_place.value_or(false)) {
    const auto graphs = step_graphs(target.graphs, false, options.device);
    if (graphs) return std::make_unique<ConcatenatedStepper>(bundle, manifest, target, *graphs, options);
  }
  std::string names;
  for (const auto& [name, graph] : target.graphs) names += (names.empty() ? "" : ", ") + name;
  throw Error("target " + target.name + " has no graph for that cache on device " + options.device +
              "; its graphs: " + names);
}

}  // namespace iapt
