// A chat template for a library that has not all settings which transformers gives Jinja.
#ifndef IAPT_SRC_CHAT_TEMPLATE_H_
#define IAPT_SRC_CHAT_TEMPLATE_H_

#include <map>
#include <string>

namespace iapt {

// The template with `trim_blocks` and `lstrip_blocks` applied to its text, as Jinja does where it reads a template, and
// its tokens defined in front of it.
//   special_tokens  name to text of the tokens that it may write
//   date            what strftime_now(...) gives; empty for the library's own, today
std::string prepared_template(const std::string& source, const std::map<std::string, std::string>& special_tokens,
                              const std::string& date);

}  // namespace iapt

#endif  // IAPT_SRC_CHAT_TEMPLATE_H_
