#include "stepper.h"

#include <algorithm>
#include <cstring>

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

size_t longest_of(const Prompts& prompts) {
  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  return longest;
}

// input_ids and attention_mask [B, T], padded on the left.
Tensors left_padded(const Prompts& prompts, int64_t pad) {
  const size_t length = longest_of(prompts);
  const std::vector<int64_t> shape{static_cast<int64_t>(prompts.size()), static_cast<int64_t>(length)};
  Tensor ids("int64", shape), mask("int64", shape);
  std::fill_n(ids.as<int64_t>(), ids.count(), pad);
  for (size_t row = 0; row < prompts.size(); ++row) {
    const size_t at = row * length + length - prompts[row].size();
    std::copy(prompts[row].begin(), prompts[row].end(), ids.as<int64_t>() + at);
    std::fill_n(mask.as<int64_t>() + at, prompts[row].size(), 1);
  }
  return {{"input_ids", ids}, {"attention_mask", mask}};
}

// The cache grows by one entry a step: standard operators, any runtime.
class ConcatenatingStepper final : public Stepper {
 public:
  ConcatenatingStepper(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
                       const RunnerOptions& options)
      : manifest_(manifest),
        target_(target),
        tenant_feeds_(bundle, manifest, target, options),
        prefill_(open_runner(bundle, target, target.graphs.at("prefill"), options)),
        decode_(open_runner(bundle, target, target.graphs.at("decode"), options)) {}

  std::string rational() const override { return prefill_->rational(); }

  Tensor prefill(const Prompts& prompts, const Names& tenants, int64_t) override {
    const GraphSpec& graph = target_.graphs.at("prefill");
    Tensors feeds = left_padded(prompts, manifest_.backbone.pad_token_id);
    feeds.merge(tenant_feeds_.feeds(graph, tenants, feeds));
    tenants_ = tenants;
    running_.assign(prompts.size(), true);
    const int64_t slots = manifest_.num_slots();
    const auto length = static_cast<int64_t>(longest_of(prompts));
    masks_.assign(prompts.size(), {});
    for (size_t row = 0; row < prompts.size(); ++row) {  // a tenant with fewer prompts leaves the first slots empty
      masks_[row].assign(static_cast<size_t>(slots), 0);
      std::fill_n(masks_[row].rbegin(), manifest_.prompt_length(tenants[row]), 1);
      masks_[row].resize(static_cast<size_t>(slots + length) - prompts[row].size(), 0);
      masks_[row].resize(static_cast<size_t>(slots + length), 1);
    }
    return keep_cache(prefill_->infer(feeds));
  }

  Tensor decode(const std::vector<int64_t>& tokens) override {
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
    feeds.merge(tenant_feeds_.feeds(target_.graphs.at("decode"), tenants_, {}));
    return keep_cache(decode_->infer(feeds));
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
  const TargetSpec& target_;
  TenantFeeds tenant_feeds_;
  std::unique_ptr<Runner> prefill_, decode_;
  Names tenants_;
  std::vector<std::vector<int64_t>> masks_;  // of every row over the cache, prompt slots first
  Tensors cache_;
};

// One graph for both kinds of step, or one for each; a row stands [its prompt slots | its tokens | padding], and its
// cache entries where they are counted. Keys and values are written into buffers that stay where they are.
class InPlaceStepper final : public Stepper {
 public:
  InPlaceStepper(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target,
                 const RunnerOptions& options)
      : manifest_(manifest),
        graph_(target.graphs.at(target.graphs.count("serve") > 0 ? "serve" : "serve_prefill")),
        tenant_feeds_(bundle, manifest, target, options),
        reader_(open_runner(bundle, target, graph_, options)),
        stepper_(target.graphs.count("serve") > 0
                     ? reader_
                     : open_runner(bundle, target, target.graphs.at("serve_decode"), options)) {}

  std::string rational() const override { return reader_->rational(); }

  Tensor prefill(const Prompts& prompts, const Names& tenants, int64_t capacity) override {
    const size_t batch = prompts.size();
    tenants_ = tenants;
    running_.assign(batch, true);
    lengths_.clear();
    for (size_t row = 0; row < batch; ++row) {
      lengths_.push_back(manifest_.prompt_length(tenants[row]) + static_cast<int64_t>(prompts[row].size()));
    }
    const int64_t length = *std::max_element(lengths_.begin(), lengths_.end());
    std::vector<int64_t> ids(batch * length, manifest_.backbone.pad_token_id), places(batch * length);
    for (size_t row = 0; row < batch; ++row) {
      const int64_t slots = lengths_[row] - static_cast<int64_t>(prompts[row].size());
      std::copy(prompts[row].begin(), prompts[row].end(), ids.begin() + row * length + slots);
      for (int64_t place = 0; place < length; ++place) places[row * length + place] = place;
    }
    make_buffers(static_cast<int64_t>(batch), std::max(capacity, length));
    weights_ = tenant_feeds_.feeds(graph_, tenants, left_padded(prompts, manifest_.backbone.pad_token_id));
    return step(ids, places, length, true);
  }

  Tensor decode(const std::vector<int64_t>& tokens) override {
    std::vector<int64_t> places;
    for (size_t row = 0; row < lengths_.size(); ++row) {  // the new entry stands after the last one
      if (running_[row]) ++lengths_[row];
      places.push_back(lengths_[row] - 1);
    }
    return step(tokens, places, 1, false);
  }

 private:
  Tensor step(const std::vector<int64_t>& ids, const std::vector<int64_t>& places, int64_t length, bool reads) {
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
  const auto encoder = target.graphs.find("encoder");
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

std::unique_ptr<Stepper> concatenating_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                               const TargetSpec& target, const RunnerOptions& options) {
  return std::make_unique<ConcatenatingStepper>(bundle, manifest, target, options);
}

std::unique_ptr<Stepper> in_place_stepper(const std::filesystem::path& bundle, const BundleManifest& manifest,
                                          const TargetSpec& target, const RunnerOptions& options) {
  return std::make_unique<InPlaceStepper>(bundle, manifest, target, options);
}

}  // namespace iapt
