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
// Numbers beyond ASCII, which Hugging Face's Digits splits off as well: Unicode's categories Nd, Nl and No.
constexpr Block kNumbers[] = {
    {0xb2, 0xb3},       {0xb9, 0xb9},       {0xbc, 0xbe},       {0x660, 0x669},     {0x6f0, 0x6f9},
    {0x7c0, 0x7c9},     {0x966, 0x96f},     {0x9e6, 0x9ef},     {0x9f4, 0x9f9},     {0xa66, 0xa6f},
    {0xae6, 0xaef},     {0xb66, 0xb6f},     {0xb72, 0xb77},     {0xbe6, 0xbf2},     {0xc66, 0xc6f},
    {0xc78, 0xc7e},     {0xce6, 0xcef},     {0xd58, 0xd5e},     {0xd66, 0xd78},     {0xde6, 0xdef},
    {0xe50, 0xe59},     {0xed0, 0xed9},     {0xf20, 0xf33},     {0x1040, 0x1049},   {0x1090, 0x1099},
    {0x1369, 0x137c},   {0x16ee, 0x16f0},   {0x17e0, 0x17e9},   {0x17f0, 0x17f9},   {0x1810, 0x1819},
    {0x1946, 0x194f},   {0x19d0, 0x19da},   {0x1a80, 0x1a89},   {0x1a90, 0x1a99},   {0x1b50, 0x1b59},
    {0x1bb0, 0x1bb9},   {0x1c40, 0x1c49},   {0x1c50, 0x1c59},   {0x2070, 0x2070},   {0x2074, 0x2079},
    {0x2080, 0x2089},   {0x2150, 0x2182},   {0x2185, 0x2189},   {0x2460, 0x249b},   {0x24ea, 0x24ff},
    {0x2776, 0x2793},   {0x2cfd, 0x2cfd},   {0x3007, 0x3007},   {0x3021, 0x3029},   {0x3038, 0x303a},
    {0x3192, 0x3195},   {0x3220, 0x3229},   {0x3248, 0x324f},   {0x3251, 0x325f},   {0x3280, 0x3289},
    {0x32b1, 0x32bf},   {0xa620, 0xa629},   {0xa6e6, 0xa6ef},   {0xa830, 0xa835},   {0xa8d0, 0xa8d9},
    {0xa900, 0xa909},   {0xa9d0, 0xa9d9},   {0xa9f0, 0xa9f9},   {0xaa50, 0xaa59},   {0xabf0, 0xabf9},
    {0xff10, 0xff19},   {0x10107, 0x10133}, {0x10140, 0x10178}, {0x1018a, 0x1018b}, {0x102e1, 0x102fb},
    {0x10320, 0x10323}, {0x10341, 0x10341}, {0x1034a, 0x1034a}, {0x103d1, 0x103d5}, {0x104a0, 0x104a9},
    {0x10858, 0x1085f}, {0x10879, 0x1087f}, {0x108a7, 0x108af}, {0x108fb, 0x108ff}, {0x10916, 0x1091b},
    {0x109bc, 0x109bd}, {0x109c0, 0x109cf}, {0x109d2, 0x109ff}, {0x10a40, 0x10a48}, {0x10a7d, 0x10a7e},
    {0x10a9d, 0x10a9f}, {0x10aeb, 0x10aef}, {0x10b58, 0x10b5f}, {0x10b78, 0x10b7f}, {0x10ba9, 0x10baf},
    {0x10cfa, 0x10cff}, {0x10d30, 0x10d39}, {0x10d40, 0x10d49}, {0x10e60, 0x10e7e}, {0x10f1d, 0x10f26},
    {0x10f51, 0x10f54}, {0x10fc5, 0x10fcb}, {0x11052, 0x1106f}, {0x110f0, 0x110f9}, {0x11136, 0x1113f},
    {0x111d0, 0x111d9}, {0x111e1, 0x111f4}, {0x112f0, 0x112f9}, {0x11450, 0x11459}, {0x114d0, 0x114d9},
    {0x11650, 0x11659}, {0x116c0, 0x116c9}, {0x116d0, 0x116e3}, {0x11730, 0x1173b}, {0x118e0, 0x118f2},
    {0x11950, 0x11959}, {0x11bf0, 0x11bf9}, {0x11c50, 0x11c6c}, {0x11d50, 0x11d59}, {0x11da0, 0x11da9},
    {0x11de0, 0x11de9}, {0x11f50, 0x11f59}, {0x11fc0, 0x11fd4}, {0x12400, 0x1246e}, {0x16130, 0x16139},
    {0x16a60, 0x16a69}, {0x16ac0, 0x16ac9}, {0x16b50, 0x16b59}, {0x16b5b, 0x16b61}, {0x16d70, 0x16d79},
    {0x16e80, 0x16e96}, {0x16ff4, 0x16ff6}, {0x1ccf0, 0x1ccf9}, {0x1d2c0, 0x1d2d3}, {0x1d2e0, 0x1d2f3},
    {0x1d360, 0x1d378}, {0x1d7ce, 0x1d7ff}, {0x1e140, 0x1e149}, {0x1e2f0, 0x1e2f9}, {0x1e4f0, 0x1e4f9},
    {0x1e5f1, 0x1e5fa}, {0x1e8c7, 0x1e8cf}, {0x1e950, 0x1e959}, {0x1ec71, 0x1ecab}, {0x1ecad, 0x1ecaf},
    {0x1ecb1, 0x1ecb4}, {0x1ed01, 0x1ed2d}, {0x1ed2f, 0x1ed3d}, {0x1f100, 0x1f10c}, {0x1fbf0, 0x1fbf9},
};

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

bool is_number(uint32_t code) { return (code >= '0' && code <= '9') || is_in(kNumbers, code); }

bool is_space(uint32_t code) {
  return code == ' ' || (code >= 0x9 && code <= 0xd) || code == 0x85 || code == 0xa0 || code == 0x1680 ||
         (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
         code == 0x3000;
}

std::string damage(const std::string& text) {
  if (replace_invalid_utf8(text) != text) return "it is not UTF-8";
  if (text.find('\0') != std::string::npos) return "it holds a zero byte";
  return "";
}

bool is_blank(const std::string& text) {
  const auto codes = code_points(text);
  return std::all_of(codes.begin(), codes.end(),
                     [](uint32_t code) { return is_space(code) || (code >= 0x1c && code <= 0x1f); });
}

}  // namespace iapt
