// probes.json: texts, conversations and ids with what transformers made of them when the bundle was built
// (iapt_export/contract/probes.py).
#ifndef IAPT_SRC_PROBES_H_
#define IAPT_SRC_PROBES_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "iapt/text.h"

namespace iapt {

constexpr int kProbesVersion = 1;

struct TextProbe {
  std::string text;
  std::vector<int64_t> ids;  // with the tokenizer's own special tokens
};

struct ChatProbe {
  std::vector<Message> messages;
  std::optional<std::string> text;  // none where the template refuses the conversation
  std::vector<int64_t> ids;
};

struct AnswerProbe {
  std::vector<int64_t> ids;
  std::string text;  // without special tokens
};

struct Probes {
  std::string date;  // what strftime_now(...) gave, whatever its pattern
  std::vector<TextProbe> texts;
  std::vector<ChatProbe> chats;
  std::vector<AnswerProbe> answers;

  // Throws Error: it is missing, no JSON, of another schema, or has missing, unknown or wrong fields (all are listed).
  static Probes load(const std::filesystem::path& bundle);
};

}  // namespace iapt

#endif  // IAPT_SRC_PROBES_H_
