// Reads the fields of a JSON object into C++ values and collects what does not fit, so that all problems of a file are
// shown together.
#ifndef IAPT_SRC_JSON_FIELDS_H_
#define IAPT_SRC_JSON_FIELDS_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace iapt {

using Json = nlohmann::json;

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

  void read(const std::string& name, int64_t& value) {
    const Json* field = find(name);
    if (field == nullptr) return;
    // what does not fit 64 bits is parsed as unsigned or as a float
    if (field->is_number_integer() && (!field->is_number_unsigned() || field->get<uint64_t>() <= INT64_MAX)) {
      value = field->get<int64_t>();
    } else {
      expected(name, *field, "int");
    }
  }

  // Fields that this reader needs not, held to their kind: `kind` is object, array or string, `or_null` allows null.
  void skip(const std::string& name, Json::value_t kind, bool required = true, bool or_null = false) {
    const Json* field = find(name, required);
    if (field == nullptr || field->type() == kind || (or_null && field->is_null())) return;
    const bool both_whole = kind == Json::value_t::number_integer && field->is_number_integer();
    if (!both_whole) expected(name, *field, Json(kind).type_name());
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
      if (element.is_number_integer()) {
        values.push_back(element.get<int64_t>());
      } else {
        problems_.push_back(where + " is " + shown(element) + ", expected int");
      }
    });
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
