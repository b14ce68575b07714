#include "tenant_card.h"

#include <algorithm>

#include "json_fields.h"

namespace iapt {
namespace {

constexpr const char* kCardKey = "iapt_tenant";
constexpr int64_t kCardVersion = 2;  // the newest

// A form's settings with those that an older file lacks; lists of names in one order.
Json comparable(const std::string& form, Json config) {
  if (form == "IAPT" && !config.contains("normalize")) config["normalize"] = false;
  for (auto& item : config.items()) {
    if (item.value().is_array()) std::sort(item.value().begin(), item.value().end());
  }
  return config;
}

// Whether the method computes what the card asks for; settings that the card leaves out do not count.
bool fits(const Json& card, const MethodSpec& method) {
  if (card["form"] != method.form) return false;
  const Json mine = comparable(method.form, card["config"]),
             theirs = comparable(method.form, parse_json(method.config));
  for (const auto& [name, value] : mine.items()) {
    if (!theirs.contains(name) || theirs[name] != value) return false;
  }
  return true;
}

Json read_card(const std::map<std::string, std::string>& metadata, const std::string& path) {
  const auto found = metadata.find(kCardKey);
  const Json card = found == metadata.end() ? Json() : parse_json(found->second);
  if (card.is_discarded() || found == metadata.end())
    throw Error(path + " carries no tenant card; build the bundle again");
  std::vector<std::string> problems;
  Fields fields(card, "tenant card", problems);
  std::string text;
  std::optional<std::string> some_text;
  int64_t version = 0;
  fields.read("schema_version", version);
  for (const char* name : {"name", "form", "backbone", "fingerprint", "trained_form", "prompt_format"}) {
    fields.read(name, text);
  }
  fields.skip("config", Json::value_t::object);
  fields.read("system_prompt", some_text, false);
  fields.texts("labels", false);
  for (const char* name : {"eos_token_id", "prompt_length"}) {
    int64_t number = 0;
    if (const Json* field = fields.find(name, false); field != nullptr && !field->is_null()) fields.read(name, number);
  }
  fields.refuse_unknown();
  if (problems.empty() && (version < 1 || version > kCardVersion))
    problems.push_back("it is of another schema_version");
  if (!problems.empty()) throw Error(path + " has no valid tenant card: " + joined(problems, "; "));
  return card;
}

Json or_null(const std::optional<std::string>& text) { return text ? Json(*text) : Json(); }

}  // namespace

void check_card(const std::map<std::string, std::string>& metadata, const std::string& path,
                const BundleManifest& manifest, const TenantSpec& tenant, const MethodSpec& method) {
  const Json card = read_card(metadata, path);
  const std::pair<const char*, Json> told[] = {
      {"name", tenant.name},
      {"fingerprint", manifest.backbone.fingerprint},
      {"trained_form", tenant.trained_form},
      {"prompt_format", tenant.prompt_format},
      {"system_prompt", or_null(tenant.system_prompt)},
      {"labels", tenant.labels},
      {"prompt_length", method.prompt_length},
  };
  std::vector<std::string> problems;
  for (const auto& [name, theirs] : told) {
    const Json mine = card.contains(name) ? card[name] : std::string(name) == "labels" ? Json::array() : Json();
    if (mine != theirs)
      problems.push_back(std::string(name) + " is " + shown(mine) + ", and " + shown(theirs) + " in the manifest");
  }
  if (!fits(card, method)) problems.push_back("form and config are not those of method " + method.name);
  const Json end = card.value("eos_token_id", Json());
  const auto& ends = manifest.backbone.eos_token_ids;
  if (!end.is_null() && std::find(ends.begin(), ends.end(), end.get<int64_t>()) == ends.end()) {
    problems.push_back("eos_token_id is " + shown(end) + ", which is none of the manifest's");
  }
  if (!problems.empty()) {
    throw Error(path + " is not what the manifest says of tenant " + tenant.name + ": its card's " +
                joined(problems, "; ") + ". Build the bundle again");
  }
}

}  // namespace iapt
