// ONNX Runtime GenAI's tokenizer and chat templates, by its C interface; the library is looked for when it is needed.
#ifndef IAPT_SRC_GENAI_H_
#define IAPT_SRC_GENAI_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace iapt {

class GenaiTokenizer {
 public:
  // Reads a folder with the library's own configuration beside tokenizer.json. Throws Error: libonnxruntime-genai.so is
  // not found, or it cannot read the tokenizer.
  explicit GenaiTokenizer(const std::filesystem::path& folder);
  ~GenaiTokenizer();
  GenaiTokenizer(const GenaiTokenizer&) = delete;
  GenaiTokenizer& operator=(const GenaiTokenizer&) = delete;

  std::vector<int64_t> encode(const std::string& text, bool add_special_tokens) const;
  // A conversation, as JSON, by a chat template, up to where the answer begins. Throws Error: the template refuses it.
  std::string render(const std::string& chat_template, const std::string& messages) const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace iapt

#endif  // IAPT_SRC_GENAI_H_
