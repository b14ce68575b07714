// Text to token ids and back. ONNX Runtime GenAI's tokenizer reads the bundle's own tokenizer.json and chat template;
// what it leaves out is done here, refused by name, or found by the bundle's probes, so that results equal training's.
// The library is optional; without it, feed token ids.
#ifndef IAPT_TEXT_H_
#define IAPT_TEXT_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "iapt/manifest.h"

namespace iapt {

struct Message {
  std::string role;  // system, user or assistant
  std::string content;
};

class TextCodec {
 public:
  // Throws Error: libonnxruntime-genai.so is not found, the bundle's tokenizer or template has a part that this program
  // reads in another way than training did, or a probe's result is not the recorded one.
  TextCodec(const std::filesystem::path& bundle, const BundleManifest& manifest);
  ~TextCodec();
  TextCodec(TextCodec&&) noexcept;
  TextCodec& operator=(TextCodec&&) noexcept;

  bool has_chat_template() const;
  // Token ids of an instruction; `chat` renders the chat template, `plain` takes the last message's text as it is,
  // `newline` with a line break behind it.
  // Throws Error: the prompt is empty, the bundle has no chat template, the template refuses the conversation, or the
  // text holds what this program cannot read as training did.
  std::vector<int64_t> encode(const std::vector<Message>& messages, const std::string& prompt_format) const;
  // A conversation as the chat template writes it, up to where the answer begins.
  //   date  what templates that write the date are told; empty tells today's, in local time
  std::string render(const std::vector<Message>& messages, const std::string& date = "") const;
  // Text of token ids, special tokens left out.
  std::string decode(const std::vector<int64_t>& tokens) const;

 private:
  struct Parts;
  std::vector<int64_t> ids_of(const std::string& text, bool add_special_tokens) const;
  void check_probes(const std::filesystem::path& bundle) const;

  std::unique_ptr<Parts> parts_;
};

}  // namespace iapt

#endif  // IAPT_TEXT_H_
