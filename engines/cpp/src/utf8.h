// What text needs to know of UTF-8, of Unicode's normal form C, and of what the tokenizer library knows of Unicode.
#ifndef IAPT_SRC_UTF8_H_
#define IAPT_SRC_UTF8_H_

#include <cstdint>
#include <string>
#include <vector>

namespace iapt {

inline constexpr const char* kReplacement = "\xef\xbf\xbd";  // U+FFFD

// Code points of a text; a byte that begins or continues none becomes U+FFFD.
std::vector<uint32_t> code_points(const std::string& text);

// Valid UTF-8: each longest part that begins no character becomes U+FFFD (as the Unicode standard recommends).
std::string replace_invalid_utf8(const std::string& bytes);

// Whether a text is surely in normal form C, by blocks of letters that are their own form and join no others.
bool is_surely_nfc(const std::string& text);

// Whether the tokenizer library puts a code point into the class (letter, digit, space, other) that Hugging Face's
// tokenizers put it into; its Unicode is of 2020.
bool has_known_class(uint32_t code);
// Whether a code point is a digit or another number, as Hugging Face's Digits sees it.
bool is_number(uint32_t code);
bool is_space(uint32_t code);

// Why a text is none that C interfaces take whole: "it is not UTF-8" or "it holds a zero byte"; empty where it is.
std::string damage(const std::string& text);
// Whether a text has nothing but white space, as Python's str.isspace sees it.
bool is_blank(const std::string& text);

}  // namespace iapt

#endif  // IAPT_SRC_UTF8_H_
