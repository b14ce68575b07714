// Reads the fields of a JSON object into C++ values and collects what does not fit, so that all problems of a file are
// shown together.
#ifndef IAPT_SRC_JSON_FIELDS_H_
#define IAPT_SRC_JSON_FIELDS_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace iapt {

using Json = nlohmann::json;

constexpr int kDeepest = 64;  // lists and objects inside each other, at most

// Strict JSON, as iapt_export/contract/schema.py takes it: no byte order mark, no NUL, no name twice in an object, at
// most kDeepest levels. What is refused is discarded (is_discarded()).
inline Json parse_json(std::string_view text) {
  Json refused(Json::value_t::discarded);
  if (text.find('\0') != std::string_view::npos || text.substr(0, 3) == "\xef\xbb\xbf") return refused;
  int depth = 0;
  bool in_string = false;
  for (size_t at = 0; at < text.size(); ++at) {  // before the parser, which takes any depth
    const char letter = text[at];
    if (in_string) {
      if (letter == '\\') ++at;
      in_string = letter != '"';
    } else if (letter == '"') {
      in_string = true;
    } else if (letter == '[' || letter == '{') {
      if (++depth > kDeepest) return refused;
    } else if (letter == ']' || letter == '}') {
      --depth;
    }
  }
  bool is_twice = false;
  std::vector<std::set<std::string>> names;
  const auto look = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) names.emplace_back();
    if (event == Json::parse_event_t::object_end) names.pop_back();
    if (event == Json::parse_event_t::key) is_twice |= !names.back().insert(parsed.get<std::string>()).second;
    return true;
  };
  Json json = Json::parse(text.begin(), text.end(), look, /*allow_exceptions=*/false);
  if (is_twice) return refused;
  return json;
}

// A value in an error's text, cut to a readable length.
inline std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

inline std::string joined(const std::vector<std::string>& parts, const char* separator) {
  std::string text;
  for (const auto& part : parts) text += (text.empty() ? "" : separator) + part;
  return text;
}

class Fields {
 public:
  Fields(const Json& object, std::string where, std::vector<std::string>& problems)
      : object_(object), where_(std::move(where)), problems_(problems) {
    if (!object.is_object()) problems_.push_back(where_ + " is " + shown(object) + ", expected an object");
  }
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;

  std::string place(const std::string& name) const { return where_ + "." + name; }

  // The field, or nullptr and a problem where it is required.
  const Json* find(const std::string& name, bool required = true) {
    known_.insert(name);
    if (!object_.is_object()) return nullptr;
    const auto found = object_.find(name);
    if (found != object_.end()) return &*found;
    if (required) problems_.push_back(place(name) + " is missing");
    return nullptr;
  }

  void read(const std::string& name, std::string& value, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr) return;
    if (field->is_string()) {
      value = field->get<std::string>();
    } else {
      expected(name, *field, "str");
    }
  }

  void read(const std::string& name, std::optional<std::string>& value, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr || field->is_null()) return;
    if (field->is_string()) {
      value = field->get<std::string>();
    } else {
      expected(name, *field, "str or null");
    }
  }

  void read(const std::string& name, int64_t& value, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr) return;
    if (is_int64(*field)) {
      value = field->get<int64_t>();
    } else {
      expected(name, *field, "int");
    }
  }

  void read(const std::string& name, bool& value, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr) return;
    if (field->is_boolean()) {
      value = field->get<bool>();
    } else {
      expected(name, *field, "bool");
    }
  }

  // Fields that this reader needs not, held to their kind: `kind` is object, array or string, `or_null` allows null.
  void skip(const std::string& name, Json::value_t kind, bool required = true, bool or_null = false) {
    const Json* field = find(name, required);
    if (field == nullptr || field->type() == kind || (or_null && field->is_null())) return;
    expected(name, *field, Json(kind).type_name());
  }

  // Calls `each(element, place)` for every element of an array.
  template <typename Each>
  void array(const std::string& name, Each each, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr) return;
    if (!field->is_array()) return expected(name, *field, "list");
    size_t index = 0;
    for (const Json& element : *field) each(element, place(name) + "[" + std::to_string(index++) + "]");
  }

  // A list of whole numbers; elements that are none are problems.
  std::vector<int64_t> integers(const std::string& name) {
    std::vector<int64_t> values;
    array(name, [&](const Json& element, const std::string& where) {
      if (is_int64(element)) {
        values.push_back(element.get<int64_t>());
      } else {
        problems_.push_back(where + " is " + shown(element) + ", expected int");
      }
    });
    return values;
  }

  // A list of texts.
  std::vector<std::string> texts(const std::string& name, bool required = true) {
    std::vector<std::string> values;
    array(
        name,
        [&](const Json& element, const std::string& where) {
          if (element.is_string()) return values.push_back(element.get<std::string>());
          problems_.push_back(where + " is " + shown(element) + ", expected str");
        },
        required);
    return values;
  }

  // An object of texts.
  std::map<std::string, std::string> text_map(const std::string& name, bool required = true) {
    std::map<std::string, std::string> values;
    object(
        name,
        [&](const std::string& key, const Json& value, const std::string& where) {
          if (value.is_string()) {
            values[key] = value.get<std::string>();
          } else {
            problems_.push_back(where + " is " + shown(value) + ", expected str");
          }
        },
        required);
    return values;
  }

  // Calls `each(key, value, place)` for every entry of an object.
  template <typename Each>
  void object(const std::string& name, Each each, bool required = true) {
    const Json* field = find(name, required);
    if (field == nullptr) return;
    if (!field->is_object()) return expected(name, *field, "object");
    for (const auto& [key, value] : field->items()) each(key, value, place(name) + "." + key);
  }

  // To be called last: names that no reader asked for.
  void refuse_unknown() {
    if (!object_.is_object()) return;
    for (const auto& [key, value] : object_.items()) {
      if (known_.count(key) == 0) problems_.push_back(place(key) + " is not a known field");
    }
  }

  void problem(const std::string& text) { problems_.push_back(where_ + text); }

 private:
  // what does not fit 64 bits is parsed as unsigned or as a float
  static bool is_int64(const Json& value) {
    return value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
  }

  void expected(const std::string& name, const Json& field, const std::string& type) {
    problems_.push_back(place(name) + " is " + shown(field) + ", expected " + type);
  }

  const Json& object_;
  std::string where_;
  std::vector<std::string>& problems_;
  std::set<std::string> known_;
};

}  // namespace iapt

#endif  // IAPT_SRC_JSON_FIELDS_H_
