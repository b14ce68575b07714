// Token ids to text, as Hugging Face's tokenizers do it: the vocabulary and the decoder of a tokenizer.json. The
// tokenizer library leaves parts of it out (Strip, broken bytes, answers of special tokens alone), so it is done here.
#ifndef IAPT_SRC_DECODER_H_
#define IAPT_SRC_DECODER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "json_fields.h"

namespace iapt {

class Decoder {
 public:
  // Of the content of a tokenizer.json. Throws Error: it has a decoder that is not known here; the text names it.
  explicit Decoder(const Json& tokenizer);

  // Text of token ids; special tokens and ids without a token are left out.
  std::string decode(const std::vector<int64_t>& tokens) const;

 private:
  using Pieces = std::vector<std::string>;
  void add(const Json& step);

  std::unordered_map<int64_t, std::string> pieces_;  // of every token that is not special
  std::vector<std::function<Pieces(Pieces)>> steps_;
};

}  // namespace iapt

#endif  // IAPT_SRC_DECODER_H_
