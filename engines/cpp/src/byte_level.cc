#include "byte_level.h"

#include <array>
#include <fstream>

#include "json_fields.h"

namespace iapt {
namespace {

// Code point to the byte that it stands for: printable Latin-1 stands for itself, the other 68 for 256 and on.
std::unordered_map<uint32_t, char> byte_of_code_point() {
  std::unordered_map<uint32_t, char> made;
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    made[printable ? byte : next++] = static_cast<char>(byte);
  }
  return made;
}

// Bytes of the sequence that a lead byte begins, 0 where it begins none; [low, high] is what may follow it directly.
int sequence_length(unsigned char lead, unsigned char* low, unsigned char* high) {
  *low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  *high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  return lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
}

// The bytes that a token's printable form stands for; a form with other characters (an added token) is text itself.
std::string bytes_of(const std::string& piece) {
  static const auto table = byte_of_code_point();
  std::string bytes;
  for (size_t at = 0; at < piece.size();) {
    const auto lead = static_cast<unsigned char>(piece[at]);
    const bool two = lead >= 0xc2 && lead <= 0xdf && at + 1 < piece.size();  // all of the table is below U+0800
    if (lead >= 0x80 && !two) return piece;
    const uint32_t code = two ? (lead & 0x1fu) << 6 | (static_cast<unsigned char>(piece[at + 1]) & 0x3fu) : lead;
    const auto found = table.find(code);
    if (found == table.end()) return piece;
    bytes += found->second;
    at += two ? 2 : 1;
  }
  return bytes;
}

bool is_byte_level(const Json& decoder) {
  if (!decoder.is_object()) return false;
  const auto type = decoder.find("type");
  if (type != decoder.end() && *type == "ByteLevel") return true;
  const auto parts = decoder.find("decoders");
  return parts != decoder.end() && parts->is_array() && parts->size() == 1 && is_byte_level((*parts)[0]);
}

}  // namespace

std::optional<ByteLevelVocabulary> ByteLevelVocabulary::load(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  const Json json = Json::parse(stream, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("decoder") || !is_byte_level(json["decoder"])) return std::nullopt;
  const auto model = json.find("model");
  if (model == json.end() || !model->is_object() || !model->contains("vocab") || !(*model)["vocab"].is_object()) {
    return std::nullopt;
  }
  ByteLevelVocabulary made;
  for (const auto& [piece, id] : (*model)["vocab"].items()) {
    if (id.is_number_integer()) made.bytes_[id.get<int64_t>()] = bytes_of(piece);
  }
  const auto added = json.find("added_tokens");
  if (added != json.end() && added->is_array()) {
    for (const Json& token : *added) {
      if (!token.is_object() || !token.contains("id") || !token["id"].is_number_integer()) return std::nullopt;
      const auto id = token["id"].get<int64_t>();
      const auto content = token.find("content");
      if (content == token.end() || !content->is_string()) return std::nullopt;
      made.bytes_[id] = bytes_of(content->get<std::string>());
      const auto special = token.find("special");
      if (special != token.end() && *special == true) made.bytes_.erase(id);
    }
  }
  return made;
}

std::string ByteLevelVocabulary::decode(const std::vector<int64_t>& tokens) const {
  std::string bytes;
  for (const int64_t token : tokens) {
    const auto found = bytes_.find(token);
    if (found != bytes_.end()) bytes += found->second;
  }
  return replace_invalid_utf8(bytes);
}

std::string replace_invalid_utf8(const std::string& bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    unsigned char low = 0, high = 0;
    const int wanted = sequence_length(static_cast<unsigned char>(bytes[at]), &low, &high);
    size_t length = 1;
    while (static_cast<int>(length) < wanted && at + length < bytes.size()) {
      const auto next = static_cast<unsigned char>(bytes[at + length]);
      if (next < low || next > high) break;
      low = 0x80;
      high = 0xbf;
      ++length;
    }
    text += static_cast<int>(length) == wanted ? bytes.substr(at, length) : "\xef\xbf\xbd";
    at += length;
  }
  return text;
}

}  // namespace iapt
