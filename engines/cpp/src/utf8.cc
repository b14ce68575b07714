#include "utf8.h"

#include <algorithm>
#include <iterator>

namespace iapt {
namespace {

// Bytes of the sequence that a lead byte begins, 0 where it begins none; [low, high] is what may follow it directly.
int sequence_length(unsigned char lead, unsigned char* low, unsigned char* high) {
  *low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  *high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  return lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
}

// Calls each(begin, length, whole) for every character, or longest part of one.
template <typename Each>
void each_character(const std::string& bytes, Each each) {
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
    each(at, length, static_cast<int>(length) == wanted);
    at += length;
  }
}

struct Block {
  uint32_t first, last;
};

// In order; every code point has combining class 0 and NFC_Quick_Check=Yes, which a test compares.
constexpr Block kOwnForm[] = {
    {0x0, 0x2ff},                                                           // Latin
    {0x375, 0x37d},                                                         // Greek
    {0x384, 0x386},      {0x388, 0x482},                                    // and Cyrillic
    {0x48a, 0x556},                                                         // with Armenian
    {0x5d0, 0x5ea},                                                         // Hebrew letters
    {0x606, 0x60f},                                                         // Arabic without vowel marks
    {0x61b, 0x64a},      {0x660, 0x66f},   {0x671, 0x6d5}, {0xe01, 0xe37},  // Thai without tone marks
    {0xe3f, 0xe47},      {0x1e00, 0x1f70},                                  // Latin and Greek, composed
    {0x2002, 0x20cf},                                                       // spaces, punctuation, currencies
    {0x2100, 0x2125},     // letterlike, without Ohm, Kelvin and Angstrom
    {0x212c, 0x2328},     // arrows, mathematics
    {0x232b, 0x2adb},     // technical, boxes, dingbats
    {0x3000, 0x3029},     // CJK punctuation
    {0x3030, 0x3098},     // Hiragana
    {0x309b, 0x9fff},     // Katakana and Han
    {0xac00, 0xd7a3},     // Hangul syllables
    {0xe000, 0xf8ff},     // private use
    {0xfb50, 0xfe1f},     // Arabic forms, variation selectors
    {0xfe30, 0xffff},     // wide and narrow forms
    {0x1d400, 0x1d7ff},   // mathematical letters
    {0x1f000, 0x1fbff},   // pictures
    {0x20000, 0x2f7ff},   // more Han
    {0xe0000, 0x10ffff},  // tags, private use
};

// Code points of the first plane whose class the library does not know: next line, and letters that came after 2020.
constexpr Block kUnknown[] = {
    {0x85, 0x85},     {0x870, 0x8ff},   {0xc5d, 0xc5d},   {0xcdd, 0xcdd},   {0x170d, 0x170d},
    {0x171f, 0x171f}, {0x1b4c, 0x1b4c}, {0x1c89, 0x1c8a}, {0x2c2f, 0x2c2f}, {0x2c5f, 0x2c5f},
    {0x9ffd, 0x9fff}, {0xa7c0, 0xa7c1}, {0xa7cb, 0xa7f4},
};
// Beyond the first plane: mathematical letters, pictures, Han, tags and private use. The scripts are left out.
constexpr Block kKnown[] = {{0x1d400, 0x1d7ff}, {0x1f000, 0x1fbff}, {0x20000, 0x2a6d6}, {0xe0000, 0x10ffff}};
// ASCII, Latin, Greek, Cyrillic, Armenian and Hebrew letters; punctuation; kana, Han, Hangul; pictures.
constexpr Block kNoDigits[] = {{0x0, 0xb1},      {0xc0, 0x65f},    {0x1e00, 0x206f},  {0x3040, 0x318f},
                               {0x3400, 0x9fff}, {0xac00, 0xd7a3}, {0x1f300, 0x1faff}};

// `blocks` are in order.
template <size_t N>
bool is_in(const Block (&blocks)[N], uint32_t code) {
  const auto* next = std::upper_bound(std::begin(blocks), std::end(blocks), code,
                                      [](uint32_t value, const Block& block) { return value < block.first; });
  return next != std::begin(blocks) && code <= std::prev(next)->last;
}

}  // namespace

std::vector<uint32_t> code_points(const std::string& text) {
  std::vector<uint32_t> found;
  each_character(text, [&](size_t at, size_t length, bool whole) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[at + i])); };
    uint32_t code = length == 1 ? byte(0) : byte(0) & (0xffu >> (length + 1));
    for (size_t i = 1; i < length; ++i) code = code << 6 | (byte(i) & 0x3fu);
    found.push_back(whole ? code : 0xfffd);
  });
  return found;
}

std::string replace_invalid_utf8(const std::string& bytes) {
  std::string text;
  each_character(
      bytes, [&](size_t at, size_t length, bool whole) { text += whole ? bytes.substr(at, length) : kReplacement; });
  return text;
}

bool is_surely_nfc(const std::string& text) {
  const auto codes = code_points(text);
  return std::all_of(codes.begin(), codes.end(), [](uint32_t code) { return is_in(kOwnForm, code); });
}

bool has_known_class(uint32_t code) { return code < 0x10000 ? !is_in(kUnknown, code) : is_in(kKnown, code); }

bool may_be_foreign_digit(uint32_t code) { return !is_in(kNoDigits, code); }

bool is_space(uint32_t code) {
  return code == ' ' || (code >= 0x9 && code <= 0xd) || code == 0x85 || code == 0xa0 || code == 0x1680 ||
         (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
         code == 0x3000;
}

}  // namespace iapt
