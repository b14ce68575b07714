// manifest.json, the contract between the exporter and everything that runs a bundle: what
// iapt_export/contract/manifest.py writes, with the same words. Fields that only a build or a validation needs are
// checked and left out.
#ifndef IAPT_MANIFEST_H_
#define IAPT_MANIFEST_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "iapt/error.h"

namespace iapt {

constexpr int kSchemaVersion = 2;

// A fixed size, or the name of a dynamic one: batch B, sequence T, past S, total S+1, capacity, tenants N.
using Size = std::variant<int64_t, std::string>;

struct TensorSpec {
  std::string name;
  std::string dtype;  // int64, int32, bool, fp32, fp16 or bf16
  std::vector<Size> shape;
};

struct GraphSpec {
  std::string path;  // relative to the bundle
  std::vector<TensorSpec> inputs, outputs;

  bool takes(std::string_view input) const;
};

struct Range {
  int64_t min = 1, opt = 1, max = 1;
};

struct Ranges {
  Range batch, sequence, past, tenants;
};

struct BackboneSpec {
  int64_t hidden_size = 0, num_layers = 0, num_kv_heads = 0, head_dim = 0, value_dim = 0, vocab_size = 0,
          max_positions = 0;
  std::string name_or_path;  // a hub id, or where it stood when the bundle was built
  std::string fingerprint;   // as tenants' cards name it
  std::vector<int64_t> eos_token_ids;
  int64_t pad_token_id = 0;
};

struct MethodSpec {
  std::string name;
  std::string form;                 // what is computed: IAPT, PROMPT_TUNING, ...
  std::string config;               // that form's settings, as JSON
  int64_t prompt_length = 0;        // cache entries (P) before the instruction
  std::vector<TensorSpec> weights;  // of one tenant, without the tenants axis
};

struct TenantSpec {
  std::string name;
  std::optional<std::string> method;  // none where it is merged into the backbone's weights
  std::optional<std::string> path;
  std::string trained_form;
  std::string prompt_format;  // chat, plain or newline; empty for the backbone: chat where there is a chat template
  std::vector<std::string> labels;
  std::optional<std::string> trained, examples;  // files that validation alone opens
  // what all of its training examples began with; empty for none, nothing where they differ or did not say
  std::optional<std::string> system_prompt;
};

struct TargetSpec {
  std::string name;  // onnxruntime, tensorrt-rtx or tensorrt
  std::string dtype;
  std::map<std::string, GraphSpec> graphs;  // prefill, decode, and others
  std::string runtime_version;
  std::string rational;  // "plugin" where engines need libiapt_trt_plugin.so
};

struct FileSpec {
  std::string sha256;
  int64_t size_bytes = 0;
};

struct BundleManifest {
  BackboneSpec backbone;
  std::vector<MethodSpec> methods;
  std::vector<TenantSpec> tenants;
  std::optional<TenantSpec> base;  // the backbone alone, under its name; none where a tenant is merged into it
  Ranges ranges;
  std::vector<TargetSpec> targets;
  std::map<std::string, FileSpec> files;  // every file but manifest.json, its hash and its signature, by path
  std::string verdict;                    // of the comparison with PyTorch: pass, fail or not run

  // Reads manifest.json of a bundle. Throws Error: it is missing, no JSON, of another schema, has missing, unknown or
  // wrong fields (all of them listed), or names a file outside the bundle.
  static BundleManifest load(const std::filesystem::path& bundle);
  // The same from text; `where` names it in errors.
  static BundleManifest parse(std::string_view text, const std::string& where);

  // The target of that name, or the first one if it is empty. Throws Error: no such target.
  const TargetSpec& target(const std::string& name) const;
  // The tenant of that name; the backbone alone for an empty one or its own. Throws Error: no such tenant.
  const TenantSpec& tenant(const std::string& name) const;
  std::vector<const TenantSpec*> tenants_of(const std::string& method) const;
  // Prompt slots that a tenant's rows use, and those of a cache.
  int64_t prompt_length(const std::string& tenant) const;
  int64_t num_slots() const;
};

// Checks that the bundle has the files that its manifest names, no others, with their sizes and hashes. Throws Error:
// all that are missing, altered or not named are listed, the manifest among them.
void verify_files(const std::filesystem::path& bundle, const BundleManifest& manifest);

// Checks that the bundle's manifest was signed with the private key of `key`, a public ed25519 key in PEM. Throws
// Error: it was not, or `key` is no such key.
void check_signature(const std::filesystem::path& bundle, const std::filesystem::path& key);

}  // namespace iapt

#endif  // IAPT_MANIFEST_H_
