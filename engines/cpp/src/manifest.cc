#include "iapt/manifest.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "iapt/graphs.h"
#include "json_fields.h"
#include "sha256.h"

namespace iapt {
namespace {

using Problems = std::vector<std::string>;
constexpr auto kObject = Json::value_t::object;
constexpr auto kString = Json::value_t::string;
constexpr int64_t kMost = 1 << 24;  // what a size is at most
constexpr int64_t kMostLayers = 10000;
constexpr int64_t kLongest = int64_t{1} << 31;  // positions, and sizes of a dynamic dimension
constexpr const char* kTensorTypes[] = {"int64", "int32", "int8", "bool", "fp32", "fp16", "bf16"};

TensorSpec read_tensor(const Json& json, const std::string& where, Problems& problems) {
  TensorSpec spec;
  Fields fields(json, where, problems);
  fields.read("name", spec.name);
  fields.read("dtype", spec.dtype);
  if (std::find(std::begin(kTensorTypes), std::end(kTensorTypes), spec.dtype) == std::end(kTensorTypes)) {
    fields.problem(".dtype is " + shown(spec.dtype) + ", expected one of int64, int32, int8, bool, fp32, fp16, bf16");
  }
  fields.array("shape", [&](const Json& size, const std::string& place) {
    if (size.is_string()) {
      spec.shape.emplace_back(size.get<std::string>());
    } else if (size.is_number_integer() && size >= 0 && size <= INT64_MAX) {
      spec.shape.emplace_back(size.get<int64_t>());
    } else {
      problems.push_back(place + " is " + shown(size) + ", expected a size or a name");
    }
  });
  fields.refuse_unknown();
  return spec;
}

GraphSpec read_graph(const Json& json, const std::string& where, Problems& problems) {
  GraphSpec spec;
  Fields fields(json, where, problems);
  fields.read("path", spec.path);
  const auto into = [&](std::vector<TensorSpec>& tensors) {
    return
        [&](const Json& tensor, const std::string& place) { tensors.push_back(read_tensor(tensor, place, problems)); };
  };
  fields.array("inputs", into(spec.inputs));
  fields.array("outputs", into(spec.outputs));
  fields.refuse_unknown();
  return spec;
}

BackboneSpec read_backbone(const Json& json, const std::string& where, Problems& problems) {
  BackboneSpec spec;
  Fields fields(json, where, problems);
  for (const char* name : {"weights_sha256", "model_type"}) fields.skip(name, kString);
  fields.read("name_or_path", spec.name_or_path);
  fields.read("fingerprint", spec.fingerprint);
  fields.skip("revision", kString, true, true);
  fields.read("hidden_size", spec.hidden_size);
  fields.read("num_layers", spec.num_layers);
  fields.read("num_kv_heads", spec.num_kv_heads);
  fields.read("head_dim", spec.head_dim);
  fields.read("value_dim", spec.value_dim, false);
  fields.read("vocab_size", spec.vocab_size);
  fields.read("max_positions", spec.max_positions);
  fields.read("pad_token_id", spec.pad_token_id);
  spec.eos_token_ids = fields.integers("eos_token_ids");
  fields.refuse_unknown();
  const auto limit = [&](const char* name, int64_t size, int64_t most, int64_t least = 1) {
    if (size >= least && size <= most) return;
    fields.problem(std::string(".") + name + " is " + std::to_string(size) + ", expected " + std::to_string(least) +
                   " to " + std::to_string(most));
  };
  limit("hidden_size", spec.hidden_size, kMost);
  limit("num_layers", spec.num_layers, kMostLayers);
  limit("num_kv_heads", spec.num_kv_heads, kMost);
  limit("head_dim", spec.head_dim, kMost);
  limit("value_dim", spec.value_dim, kMost, 0);
  limit("vocab_size", spec.vocab_size, kMost);
  limit("max_positions", spec.max_positions, kLongest);
  auto tokens = spec.eos_token_ids;
  tokens.push_back(spec.pad_token_id);
  for (const int64_t token : tokens) {
    if (token >= 0 && token < spec.vocab_size) continue;
    fields.problem(": token id " + std::to_string(token) + " is not in the vocabulary");
  }
  return spec;
}

MethodSpec read_method(const Json& json, const std::string& where, Problems& problems) {
  MethodSpec spec;
  Fields fields(json, where, problems);
  fields.read("name", spec.name);
  fields.read("form", spec.form);
  fields.skip("config", kObject);
  if (const Json* config = fields.find("config", false)) spec.config = config->dump();
  fields.read("prompt_length", spec.prompt_length);
  fields.array("weights", [&](const Json& tensor, const std::string& place) {
    spec.weights.push_back(read_tensor(tensor, place, problems));
  });
  fields.skip("in_decode", Json::value_t::boolean, false);
  fields.refuse_unknown();
  if (spec.prompt_length < 0 || spec.prompt_length > kMost) fields.problem(".prompt_length is out of range");
  return spec;
}

TenantSpec read_tenant(const Json& json, const std::string& where, Problems& problems) {
  TenantSpec spec;
  Fields fields(json, where, problems);
  fields.read("name", spec.name);
  fields.read("method", spec.method);
  fields.read("path", spec.path);
  fields.read("trained_form", spec.trained_form);
  fields.skip("trained_config", kObject);
  fields.read("prompt_format", spec.prompt_format);
  fields.read("system_prompt", spec.system_prompt, false);
  spec.labels = fields.texts("labels", false);
  fields.read("trained", spec.trained, false);
  fields.read("examples", spec.examples, false);
  fields.refuse_unknown();
  if (spec.prompt_format != "chat" && spec.prompt_format != "plain" && spec.prompt_format != "newline") {
    fields.problem(".prompt_format is " + shown(spec.prompt_format) + ", expected chat, plain or newline");
  }
  return spec;
}

Range read_range(const Json* json, const std::string& where, Problems& problems) {
  Range range;
  if (json == nullptr) return range;
  Fields fields(*json, where, problems);
  fields.read("min", range.min);
  fields.read("opt", range.opt);
  fields.read("max", range.max);
  fields.refuse_unknown();
  if (!(1 <= range.min && range.min <= range.opt && range.opt <= range.max)) {
    fields.problem(" is not ordered: expected 1 <= min <= opt <= max");
  }
  if (range.max > kLongest) fields.problem(".max is too large: expected at most " + std::to_string(kLongest));
  return range;
}

Ranges read_ranges(const Json& json, const std::string& where, Problems& problems) {
  Ranges ranges;
  Fields fields(json, where, problems);
  ranges.batch = read_range(fields.find("batch"), fields.place("batch"), problems);
  ranges.sequence = read_range(fields.find("sequence"), fields.place("sequence"), problems);
  ranges.past = read_range(fields.find("past"), fields.place("past"), problems);
  ranges.tenants = read_range(fields.find("tenants"), fields.place("tenants"), problems);
  fields.refuse_unknown();
  return ranges;
}

TargetSpec read_target(const Json& json, const std::string& where, Problems& problems) {
  TargetSpec spec;
  Fields fields(json, where, problems);
  fields.read("name", spec.name);
  fields.read("dtype", spec.dtype);
  int64_t opset = 0;
  fields.read("opset", opset);
  fields.object("graphs", [&](const std::string& name, const Json& graph, const std::string& place) {
    spec.graphs[name] = read_graph(graph, place, problems);
  });
  fields.read("runtime_version", spec.runtime_version);
  fields.skip("compute_capability", kString, false, true);
  fields.text_map("source_sha256", false);
  fields.object(
      "passes",
      [&](const std::string& name, const Json&, const std::string&) {
        Fields(*fields.find("passes"), fields.place("passes"), problems).text_map(name);
      },
      false);
  spec.rational = "function";
  fields.read("rational", spec.rational, false);
  fields.skip("quantise", kString, false);
  fields.refuse_unknown();
  if (!step_graphs(spec.graphs, true) && !step_graphs(spec.graphs, false)) {
    fields.problem(".graphs has none that read instructions and go on from them");
  }
  return spec;
}

FileSpec read_file(const Json& json, const std::string& where, Problems& problems) {
  FileSpec spec;
  Fields fields(json, where, problems);
  fields.read("sha256", spec.sha256);
  fields.read("size_bytes", spec.size_bytes);
  fields.refuse_unknown();
  const bool is_hex =
      spec.sha256.size() == 64 && spec.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!is_hex || spec.size_bytes < 0) fields.problem(": expected a SHA-256 in 64 hex digits and a size of at least 0");
  return spec;
}

// The backbone as those call it who ask it: its hub id, or the name of its folder or file.
TenantSpec backbone_alone(std::string named) {
  const bool is_hub_id = std::count(named.begin(), named.end(), '/') == 1 && named.find_first_of("/.~") != 0;
  if (!is_hub_id) {
    while (!named.empty() && named.back() == '/') named.pop_back();
    named = named.substr(named.rfind('/') + 1);  // all of it where there is none
  }
  TenantSpec spec;
  spec.name = named;
  spec.trained_form = "none";
  return spec;
}

BundleManifest read_manifest(const Json& json, Problems& problems) {
  BundleManifest manifest;
  Fields fields(json, "manifest", problems);
  fields.find("schema_version");
  fields.text_map("versions");
  fields.skip("build_key", kString);
  if (const Json* backbone = fields.find("backbone")) {
    manifest.backbone = read_backbone(*backbone, fields.place("backbone"), problems);
  }
  fields.array("methods", [&](const Json& item, const std::string& place) {
    manifest.methods.push_back(read_method(item, place, problems));
  });
  fields.array("tenants", [&](const Json& item, const std::string& place) {
    manifest.tenants.push_back(read_tenant(item, place, problems));
  });
  if (const Json* ranges = fields.find("ranges")) {
    manifest.ranges = read_ranges(*ranges, fields.place("ranges"), problems);
  }
  fields.skip("cache_layout", kString, false);
  fields.skip("op_domain", kString);
  int64_t op_version = 0;
  fields.read("op_version", op_version);
  fields.array("targets", [&](const Json& item, const std::string& place) {
    manifest.targets.push_back(read_target(item, place, problems));
  });
  if (const Json* parity = fields.find("parity")) {
    Fields proof(*parity, fields.place("parity"), problems);
    proof.read("verdict", manifest.verdict);
    proof.skip("tolerances", kObject, false);
    proof.skip("measured", kObject, false);
    proof.skip("depth", kString, false);
    proof.skip("cases", kObject, false);
    proof.refuse_unknown();
  }
  fields.object("files", [&](const std::string& name, const Json& item, const std::string& place) {
    manifest.files[name] = read_file(item, place, problems);
  });
  bool serves_backbone = false;
  fields.read("serves_backbone", serves_backbone, false);
  if (serves_backbone) manifest.base = backbone_alone(manifest.backbone.name_or_path);
  fields.skip("documentation", kString, false);
  fields.refuse_unknown();
  return manifest;
}

// Paths of the files that a session or a comparison opens by name.
std::vector<std::string> used_paths(const BundleManifest& manifest) {
  std::vector<std::string> paths;
  for (const auto& tenant : manifest.tenants) {
    for (const auto& path : {tenant.path, tenant.trained, tenant.examples}) {
      if (path) paths.push_back(*path);
    }
  }
  for (const auto& target : manifest.targets) {
    for (const auto& [name, graph] : target.graphs) paths.push_back(graph.path);
  }
  return paths;
}

bool leaves_bundle(const std::string& path) {
  if (path.find('\\') != std::string::npos || path.find('\0') != std::string::npos) return true;
  size_t begin = 0;
  while (true) {  // every part of the path
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return true;
    if (end == path.size()) return false;
    begin = end + 1;
  }
}

template <typename Items>
void refuse_twice(const std::string& kind, const Items& items, Problems& problems) {
  std::set<std::string> names;
  for (const auto& item : items) {
    if (!names.insert(item.name).second) problems.push_back(kind + " " + item.name + " is named twice");
  }
}

void check_references(const BundleManifest& manifest, Problems& problems) {
  auto paths = used_paths(manifest);
  for (const auto& [name, file] : manifest.files) paths.push_back(name);
  std::sort(paths.begin(), paths.end());
  paths.erase(std::unique(paths.begin(), paths.end()), paths.end());
  for (const auto& path : paths) {
    if (leaves_bundle(path)) {
      problems.push_back("path " + shown(path) + " leaves the bundle; expected a relative path without '..'");
    }
  }
  for (const auto& tenant : manifest.tenants) {
    const auto is_method = [&](const MethodSpec& method) { return method.name == *tenant.method; };
    if (tenant.method && std::none_of(manifest.methods.begin(), manifest.methods.end(), is_method)) {
      problems.push_back("tenant " + tenant.name + " is of method " + shown(*tenant.method) +
                         ", which the manifest does not describe");
    }
    if (!tenant.path && !tenant.trained) {
      problems.push_back("tenant " + tenant.name + " names no weights, neither as path nor as trained");
    }
  }
  refuse_twice("method", manifest.methods, problems);
  refuse_twice("tenant", manifest.tenants, problems);
  refuse_twice("target", manifest.targets, problems);
}

// The files of a bundle that its manifest does not list: itself, its hash as sha256sum writes it, its signature.
constexpr const char* kOutside[] = {"manifest.json", "manifest.sha256", "manifest.sig"};

Problems seal_problems(const std::filesystem::path& bundle) {
  std::ifstream stream(bundle / "manifest.sha256", std::ios::binary);
  if (!stream) return {"manifest.sha256 is missing"};
  const std::string seal(std::istreambuf_iterator<char>(stream), {});
  if (seal == file_sha256(bundle / "manifest.json") + "  manifest.json\n") return {};
  return {"manifest.json was altered: its SHA-256 differs from that in manifest.sha256"};
}

// Every file of a bundle, and every link to a folder, by its path in the bundle.
Problems files_of(const std::filesystem::path& bundle) {
  Problems names;
  std::error_code failure;
  for (std::filesystem::recursive_directory_iterator item(bundle, failure), end; item != end; item.increment(failure)) {
    if (failure) throw Error(bundle.string() + " cannot be read: " + failure.message());
    if (item->is_symlink() || !item->is_directory())
      names.push_back(item->path().lexically_relative(bundle).generic_string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

template <typename Items>
std::string names_of(const Items& items) {
  Problems names;
  for (const auto& item : items) names.push_back(item.name);
  return names.empty() ? "none" : joined(names, ", ");
}

}  // namespace

bool GraphSpec::takes(std::string_view input) const {
  return std::any_of(inputs.begin(), inputs.end(), [&](const TensorSpec& tensor) { return tensor.name == input; });
}

BundleManifest BundleManifest::parse(std::string_view text, const std::string& where) {
  const Json json = parse_json(text);
  if (json.is_discarded()) throw Error(where + " is not JSON; build the bundle again");
  const auto version = json.is_object() && json.contains("schema_version") ? json["schema_version"] : Json();
  if (!version.is_number_integer() || version != kSchemaVersion) {
    throw Error(where + ": schema_version is " + shown(version) + ", this program reads " +
                std::to_string(kSchemaVersion) + "; build the bundle again, or take the program of its version");
  }
  Problems problems;
  BundleManifest manifest = read_manifest(json, problems);
  if (problems.empty()) check_references(manifest, problems);
  if (!problems.empty()) throw Error(where + " is not a valid manifest: " + joined(problems, "; "));
  return manifest;
}

BundleManifest BundleManifest::load(const std::filesystem::path& bundle) {
  const auto path = bundle / "manifest.json";
  std::ifstream stream(path, std::ios::binary);
  if (!stream || !std::filesystem::is_regular_file(path)) {
    throw Error(bundle.string() + " holds no manifest.json; expected a bundle written by 'iapt-export build'");
  }
  const std::string text(std::istreambuf_iterator<char>(stream), {});
  return parse(text, path.string());
}

const TargetSpec& BundleManifest::target(const std::string& name) const {
  for (const auto& target : targets) {
    if (name.empty() || target.name == name) return target;
  }
  throw Error("target '" + name + "' is not in this bundle, which has " + names_of(targets) +
              "; build again with --target " + name);
}

const TenantSpec& BundleManifest::tenant(const std::string& name) const {
  for (const auto& tenant : tenants) {
    if (tenant.name == name) return tenant;
  }
  if (base && (name.empty() || name == base->name || name == backbone.name_or_path)) return *base;
  const std::string known = tenants.empty() ? "none" : names_of(tenants);
  if (name.empty()) {
    throw Error(
        "the backbone alone cannot be asked in this bundle: a tenant is merged into it, or it was built by an earlier "
        "version; its tenants are " +
        known);
  }
  throw Error("tenant '" + name + "' is not in this bundle; its tenants are " + known);
}

std::vector<const TenantSpec*> BundleManifest::tenants_of(const std::string& method) const {
  std::vector<const TenantSpec*> found;
  for (const auto& tenant : tenants) {
    if (tenant.method == method) found.push_back(&tenant);
  }
  return found;
}

int64_t BundleManifest::prompt_length(const std::string& name) const {
  const auto& method = tenant(name).method;
  for (const auto& spec : methods) {
    if (method == spec.name) return spec.prompt_length;
  }
  return 0;
}

int64_t BundleManifest::num_slots() const {
  int64_t most = 0;
  for (const auto& spec : methods) most = std::max(most, spec.prompt_length);
  return most;
}

void verify_files(const std::filesystem::path& bundle, const BundleManifest& manifest) {
  Problems problems = seal_problems(bundle);
  for (const auto& name : used_paths(manifest)) {
    if (manifest.files.count(name) == 0) problems.push_back(name + " is used but has no hash");
  }
  for (const auto& [name, spec] : manifest.files) {
    const auto path = bundle / name;
    std::error_code failure;
    const auto size = static_cast<int64_t>(std::filesystem::file_size(path, failure));
    if (failure || !std::filesystem::is_regular_file(path)) {
      problems.push_back(name + " is missing");
    } else if (size != spec.size_bytes) {
      problems.push_back(name + " has " + std::to_string(size) + " bytes, expected " + std::to_string(spec.size_bytes));
    } else if (file_sha256(path) != spec.sha256) {
      problems.push_back(name + " was altered: its SHA-256 differs from the manifest's");
    }
  }
  for (const auto& name : files_of(bundle)) {
    if (manifest.files.count(name) == 0 &&
        std::find(std::begin(kOutside), std::end(kOutside), name) == std::end(kOutside)) {
      problems.push_back(name + " is not in the manifest");
    }
  }
  if (!problems.empty()) {
    throw Error(bundle.string() + " is damaged: " + joined(problems, "; ") + ". Copy or build the bundle again");
  }
}

}  // namespace iapt
