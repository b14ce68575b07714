// Byte-level vocabularies (GPT-2's, and so Llama 3's, Qwen's and SmolLM's) write each byte of a text as one printable
// character. The tokenizer library turns a whole answer into one replacement character when a single byte of it is no
// UTF-8, so such answers are decoded here, the way Hugging Face's tokenizers do.
#ifndef IAPT_SRC_BYTE_LEVEL_H_
#define IAPT_SRC_BYTE_LEVEL_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace iapt {

class ByteLevelVocabulary {
 public:
  // Of a tokenizer.json; none where its decoder is another one.
  static std::optional<ByteLevelVocabulary> load(const std::filesystem::path& path);

  // Text of token ids, special tokens left out; bytes that are no UTF-8 become replacement characters.
  std::string decode(const std::vector<int64_t>& tokens) const;

 private:
  std::unordered_map<int64_t, std::string> bytes_;  // of every token that is not special
};

// Valid UTF-8: each longest part that begins no character becomes U+FFFD (as the Unicode standard recommends).
std::string replace_invalid_utf8(const std::string& bytes);

}  // namespace iapt

#endif  // IAPT_SRC_BYTE_LEVEL_H_
