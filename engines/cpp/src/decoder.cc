#include "decoder.h"

#include <algorithm>
#include <numeric>

#include "iapt/error.h"
#include "utf8.h"

namespace iapt {
namespace {

using Pieces = std::vector<std::string>;

// Code point to the byte that it stands for in a byte-level vocabulary: printable Latin-1 stands for itself, the other
// 68 for 256 and on.
std::unordered_map<uint32_t, char> byte_of_code_point() {
  std::unordered_map<uint32_t, char> made;
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    made[printable ? byte : next++] = static_cast<char>(byte);
  }
  return made;
}

// The bytes that a token's printable form stands for; a form with other characters (an added token) is text itself.
std::string bytes_of(const std::string& piece) {
  static const auto table = byte_of_code_point();
  std::string bytes;
  for (const uint32_t code : code_points(piece)) {
    const auto found = table.find(code);
    if (found == table.end()) return piece;
    bytes += found->second;
  }
  return bytes;
}

std::string joined(const Pieces& pieces) { return std::accumulate(pieces.begin(), pieces.end(), std::string()); }

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = 0; !from.empty() && (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
}

// The value of <0x1F>, -1 for any other piece.
int byte_value(const std::string& piece) {
  if (piece.size() != 6 || piece.compare(0, 3, "<0x") != 0 || piece[5] != '>') return -1;
  if (!std::isxdigit(static_cast<unsigned char>(piece[3])) || !std::isxdigit(static_cast<unsigned char>(piece[4]))) {
    return -1;
  }
  return std::stoi(piece.substr(3, 2), nullptr, 16);
}

// A run of <0x..> is the text of its bytes, or one replacement character for each byte where they are no text.
Pieces with_bytes(const Pieces& pieces) {
  Pieces made;
  std::string bytes;
  const auto flush = [&] {
    if (replace_invalid_utf8(bytes) == bytes) {
      if (!bytes.empty()) made.push_back(bytes);
    } else {
      made.insert(made.end(), bytes.size(), kReplacement);
    }
    bytes.clear();
  };
  for (const auto& piece : pieces) {
    const int value = byte_value(piece);
    if (value >= 0) {
      bytes += static_cast<char>(value);
      continue;
    }
    flush();
    made.push_back(piece);
  }
  flush();
  return made;
}

Pieces stripped(Pieces pieces, const std::string& content, int64_t start, int64_t stop) {
  for (auto& piece : pieces) {
    for (int64_t i = 0; i < start && piece.compare(0, content.size(), content) == 0; ++i)
      piece.erase(0, content.size());
    for (int64_t i = 0; i < stop && piece.size() >= content.size() &&
                        piece.compare(piece.size() - content.size(), content.size(), content) == 0;
         ++i) {
      piece.erase(piece.size() - content.size());
    }
  }
  return pieces;
}

std::string text_of(const Json& object, const char* name) {
  const auto found = object.find(name);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

int64_t number_of(const Json& object, const char* name) {
  const auto found = object.find(name);
  return found != object.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
}

}  // namespace

Decoder::Decoder(const Json& tokenizer) {
  for (const auto& [piece, id] : tokenizer.at("model").at("vocab").items()) pieces_[id.get<int64_t>()] = piece;
  for (const Json& token : tokenizer.value("added_tokens", Json::array())) {
    const auto id = token.at("id").get<int64_t>();
    pieces_[id] = token.at("content").get<std::string>();
    if (token.value("special", false)) pieces_.erase(id);
  }
  add(tokenizer.value("decoder", Json()));
}

void Decoder::add(const Json& step) {
  const std::string type = step.is_object() ? text_of(step, "type") : "none";
  if (type == "Sequence") {
    for (const Json& part : step.at("decoders")) add(part);
  } else if (type == "ByteLevel") {
    steps_.emplace_back([](const Pieces& pieces) {
      std::string bytes;
      for (const auto& piece : pieces) bytes += bytes_of(piece);
      return Pieces{replace_invalid_utf8(bytes)};
    });
  } else if (type == "ByteFallback") {
    steps_.emplace_back(with_bytes);
  } else if (type == "Fuse") {
    steps_.emplace_back([](const Pieces& pieces) { return Pieces{joined(pieces)}; });
  } else if (type == "Strip" && !text_of(step, "content").empty()) {
    steps_.emplace_back(
        [content = text_of(step, "content"), start = number_of(step, "start"),
         stop = number_of(step, "stop")](Pieces pieces) { return stripped(std::move(pieces), content, start, stop); });
  } else if (type == "Replace" && step.at("pattern").contains("String")) {
    steps_.emplace_back([from = text_of(step.at("pattern"), "String"), to = text_of(step, "content")](Pieces pieces) {
      for (auto& piece : pieces) replace_all(piece, from, to);
      return pieces;
    });
  } else if (type == "Metaspace") {
    steps_.emplace_back(
        [mark = text_of(step, "replacement"), drops_first = text_of(step, "prepend_scheme") != "never"](Pieces pieces) {
          if (drops_first && !pieces.empty()) replace_all(pieces.front(), mark, "");
          for (auto& piece : pieces) replace_all(piece, mark, " ");
          return pieces;
        });
  } else {
    throw Error("its decoder is " + type +
                ", and this program decodes ByteLevel, ByteFallback, Fuse, Metaspace, Strip "
                "and Replace of a text");
  }
}

std::string Decoder::decode(const std::vector<int64_t>& tokens) const {
  Pieces pieces;
  for (const int64_t token : tokens) {
    const auto found = pieces_.find(token);
    if (found != pieces_.end()) pieces.push_back(found->second);
  }
  for (const auto& step : steps_) pieces = step(std::move(pieces));
  return joined(pieces);
}

}  // namespace iapt
