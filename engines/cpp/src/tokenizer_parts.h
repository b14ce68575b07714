// Which tokenizer.json, and which texts, the tokenizer library is known to read as Hugging Face's tokenizers do.
#ifndef IAPT_SRC_TOKENIZER_PARTS_H_
#define IAPT_SRC_TOKENIZER_PARTS_H_

#include <string>
#include <vector>

#include "json_fields.h"

namespace iapt {

class TokenizerParts {
 public:
  // Throws Error: the first part that the library leaves out in silence, or ends the process on; the text names it.
  explicit TokenizerParts(const Json& tokenizer);

  // Why a text would get other ids than in training; empty where it gets the same.
  std::string refusal(const std::string& text) const;
  // The parts that the library is to read one after the other, each without regard to its neighbours.
  std::vector<std::string> pieces(const std::string& text) const;

 private:
  void read_pre_tokenizer(const Json& part);
  void check_added_token(const Json& token, bool is_normalised);

  bool normalises_ = false;  // to normal form C, which the library leaves out
  bool by_classes_ = false;  // splits by letters, digits and spaces
  bool digits_alone_ = false;
  bool strips_right_ = false;       // an added token takes the spaces behind it with it
  std::vector<std::string> added_;  // texts of added tokens, the longest first
};

}  // namespace iapt

#endif  // IAPT_SRC_TOKENIZER_PARTS_H_
