#include "chat_template.h"

#include "iapt/error.h"

namespace iapt {
namespace {

// Where the tag that begins at `begin` ends, behind its last character; the end of the text where it has no end.
size_t end_of_tag(const std::string& text, size_t begin) {
  const char kind = text[begin + 1];
  const std::string close = kind == '%' ? "%}" : kind == '{' ? "}}" : "#}";
  char quote = 0;
  for (size_t at = begin + 2; at < text.size(); ++at) {
    if (quote != 0) {
      if (text[at] == '\\') ++at;
      else if (text[at] == quote) quote = 0;
    } else if (kind != '#' && (text[at] == '"' || text[at] == '\'')) {
      quote = text[at];
    } else if (text.compare(at, 2, close) == 0) {
      return at + 2;
    }
  }
  return text.size();
}

size_t next_tag(const std::string& text, size_t at) {
  while ((at = text.find('{', at)) != std::string::npos && at + 1 < text.size()) {
    if (text[at + 1] == '%' || text[at + 1] == '{' || text[at + 1] == '#') return at;
    ++at;
  }
  return std::string::npos;
}

std::string with_line_feeds(const std::string& source) {
  std::string text;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') continue;
    text += source[i] == '\r' ? '\n' : source[i];
  }
  if (!text.empty() && text.back() == '\n') text.pop_back();  // Jinja drops the last one
  return text;
}

// Without the spaces between the line's begin and a tag; `begins_line` says that the text before it ended a line.
std::string without_indent(const std::string& data, bool begins_line) {
  const size_t line = data.rfind('\n');
  if (line == std::string::npos && !begins_line) return data;
  const size_t first = line == std::string::npos ? 0 : line + 1;
  return data.find_first_not_of(" \t", first) == std::string::npos ? data.substr(0, first) : data;
}

// A line's tags take the spaces in front of them and the line end behind them with them; "+" says that they do not.
std::string trimmed(const std::string& source) {
  const std::string text = with_line_feeds(source);
  std::string made;
  size_t at = 0;
  bool begins_line = true;
  for (size_t begin; (begin = next_tag(text, at)) != std::string::npos;) {
    const std::string data = text.substr(at, begin - at);
    at = end_of_tag(text, begin);
    std::string tag = text.substr(begin, at - begin);
    const bool is_block = tag[1] != '{' && tag.size() > 4;
    const char left = is_block ? tag[2] : '-', right = is_block ? tag[tag.size() - 3] : '-';
    made += left == '-' || left == '+' ? data : without_indent(data, begins_line);
    begins_line = right != '-' && right != '+' && at < text.size() && text[at] == '\n';
    if (begins_line) ++at;
    if (right == '+') tag.erase(tag.size() - 3, 1);
    if (left == '+') tag.erase(2, 1);
    made += tag;
  }
  return made + text.substr(at);
}

// A text between quotes, as every Jinja reads it. Throws Error: there is no such form.
std::string quoted(const std::string& text) {
  const char quote = text.find('\'') == std::string::npos ? '\'' : '"';
  if (text.find(quote) != std::string::npos || text.find('\\') != std::string::npos) {
    throw Error("the bundle's chat template cannot be told of the special token " + text);
  }
  return quote + text + quote;
}

}  // namespace

std::string prepared_template(const std::string& source, const std::map<std::string, std::string>& special_tokens,
                              const std::string& date) {
  std::string defined;
  for (const auto& [name, text] : special_tokens) {
    if (source.find(name) != std::string::npos) defined += "{%- set " + name + " = " + quoted(text) + " %}";
  }
  if (!date.empty()) defined += "{%- macro strftime_now(format) -%}" + date + "{%- endmacro %}";
  return defined + trimmed(source);
}

}  // namespace iapt
