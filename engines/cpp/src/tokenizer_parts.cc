#include "tokenizer_parts.h"

#include <algorithm>

#include "iapt/error.h"
#include "utf8.h"

namespace iapt {
namespace {

// Patterns of Split by which the library was compared with Hugging Face's tokenizers over all letters: GPT-2's, Llama
// 3's and Qwen 2's.
constexpr const char* kPatterns[] = {
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)",
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
};

[[noreturn]] void refuse(const std::string& part) {
  throw Error("its tokenizer has " + part + ", which this program does not read as training did");
}

std::string type_of(const Json& part) {
  return part.is_object() ? part.value("type", std::string("no type")) : std::string("none");
}

bool has(const Json& object, const char* flag) {
  const auto found = object.find(flag);
  return found != object.end() && *found == true;
}

// The parts of a Sequence, or the part itself; nothing where there is none.
std::vector<Json> parts_of(const Json& part, const char* name) {
  if (part.is_null()) return {};
  if (type_of(part) != "Sequence") return {part};
  std::vector<Json> found;
  for (const Json& inner : part.at(name)) {
    const auto deeper = parts_of(inner, name);
    found.insert(found.end(), deeper.begin(), deeper.end());
  }
  return found;
}

bool is_known_split(const Json& part) {
  const Json& pattern = part.at("pattern");
  if (pattern == Json{{"String", " "}}) return true;  // Gemma's
  const bool known = std::any_of(std::begin(kPatterns), std::end(kPatterns),
                                 [&](const char* text) { return pattern == Json{{"Regex", text}}; });
  return known && part.value("behavior", "") == "Isolated" && !has(part, "invert");
}

// The character at a place, in bytes.
size_t width_at(const std::string& text, size_t at) {
  size_t width = 1;
  while (at + width < text.size() && (static_cast<unsigned char>(text[at + width]) & 0xc0) == 0x80) ++width;
  return width;
}

}  // namespace

TokenizerParts::TokenizerParts(const Json& tokenizer) {
  const Json& model = tokenizer.at("model");
  if (type_of(model) != "BPE") refuse("a model of type " + type_of(model));
  for (const Json& part : parts_of(tokenizer.value("pre_tokenizer", Json()), "pretokenizers")) read_pre_tokenizer(part);
  if (!by_classes_ && !has(model, "byte_fallback")) refuse("no bytes for letters outside its vocabulary");
  bool rewrites = false;
  for (const Json& part : parts_of(tokenizer.value("normalizer", Json()), "normalizers")) {
    const std::string type = type_of(part);
    if (type == "NFC") {
      normalises_ = true;
    } else if (type == "Prepend" || type == "Replace") {
      rewrites = true;  // spaces as metaspaces, which the library knows of Llama's and Gemma's tokenizers
    } else {
      refuse("a normalizer of type " + type);
    }
  }
  for (const Json& token : tokenizer.value("added_tokens", Json::array())) check_added_token(token, rewrites);
  std::sort(added_.begin(), added_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

void TokenizerParts::read_pre_tokenizer(const Json& part) {
  const std::string type = type_of(part);
  if (type == "ByteLevel") {
    if (has(part, "add_prefix_space")) refuse("a ByteLevel pre-tokenizer with add_prefix_space");
    if (!by_classes_ && !has(part, "use_regex")) refuse("a ByteLevel pre-tokenizer without use_regex");
    by_classes_ = true;
  } else if (type == "Split") {
    if (!is_known_split(part)) refuse("a Split pre-tokenizer by " + shown(part.at("pattern")));
    by_classes_ = by_classes_ || part.at("pattern").contains("Regex");
  } else if (type == "Digits") {
    if (!has(part, "individual_digits")) refuse("a Digits pre-tokenizer without individual_digits");
    digits_alone_ = true;
  } else if (type == "Metaspace") {
    if (part.value("prepend_scheme", "") == "never") refuse("a Metaspace pre-tokenizer that prepends nothing");
  } else {
    refuse("a pre-tokenizer of type " + type);
  }
}

void TokenizerParts::check_added_token(const Json& token, bool is_normalised) {
  const std::string content = token.at("content").get<std::string>();
  for (const char* flag : {"single_word", "lstrip", "normalized"}) {
    const bool counts = is_normalised || std::string(flag) != "normalized";
    if (counts && has(token, flag)) refuse(std::string(flag) + " on its token " + shown(content));
  }
  strips_right_ = strips_right_ || has(token, "rstrip");
  if (!content.empty()) added_.push_back(content);
}

std::string TokenizerParts::refusal(const std::string& text) const {
  if (const std::string broken = damage(text); !broken.empty()) return broken;
  if (normalises_ && !is_surely_nfc(text)) {
    return "it may not be in Unicode's normal form C, into which the bundle's tokenizer brings it and this program "
           "does not";
  }
  for (const uint32_t code : code_points(text)) {
    if (strips_right_ && is_space(code) && (code > ' ' || code == '\v' || code == '\f')) return "it holds rare spaces";
    if (by_classes_ && !has_known_class(code)) return "it holds letters that the tokenizer library does not know";
  }
  return "";
}

std::vector<std::string> TokenizerParts::pieces(const std::string& text) const {
  if (!digits_alone_) return {text};
  std::vector<std::string> found{""};
  for (size_t at = 0; at < text.size();) {
    const auto token = std::find_if(added_.begin(), added_.end(), [&](const std::string& content) {
      return text.compare(at, content.size(), content) == 0;
    });
    const size_t width = token == added_.end() ? width_at(text, at) : token->size();
    const bool alone = token == added_.end() && is_number(code_points(text.substr(at, width)).front());
    if (alone && !found.back().empty()) found.emplace_back();
    found.back() += text.substr(at, width);
    if (alone) found.emplace_back();
    at += width;
  }
  if (found.size() > 1 && found.back().empty()) found.pop_back();
  return found;
}

}  // namespace iapt
