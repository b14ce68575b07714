// ed25519 signatures over manifest.json, as iapt_export/contract/integrity.py writes them.
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>

#include "iapt/manifest.h"

namespace iapt {
namespace {

constexpr size_t kSignatureBytes = 64;
constexpr size_t kEncodedBytes = 88;  // in base64

std::string content_of(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// The bytes of a signature in base64; empty where it is none.
std::string decoded(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) text.pop_back();
  if (text.size() != kEncodedBytes || text.substr(86) != "==") return "";
  std::string bytes(kEncodedBytes / 4 * 3, '\0');
  const auto* from = reinterpret_cast<const unsigned char*>(text.data());
  if (EVP_DecodeBlock(reinterpret_cast<unsigned char*>(bytes.data()), from, kEncodedBytes) < 0) return "";
  return bytes.substr(0, kSignatureBytes);
}

}  // namespace

void check_signature(const std::filesystem::path& bundle, const std::filesystem::path& key) {
  const std::string pem = content_of(key);
  const std::unique_ptr<BIO, decltype(&BIO_free)> memory(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())),
                                                         BIO_free);
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> known(
      memory ? PEM_read_bio_PUBKEY(memory.get(), nullptr, nullptr, nullptr) : nullptr, EVP_PKEY_free);
  if (!known || EVP_PKEY_base_id(known.get()) != EVP_PKEY_ED25519) {
    throw Error(key.string() + " is not a public ed25519 key in PEM, as 'openssl pkey -pubout' writes it");
  }
  const auto path = bundle / "manifest.sig";
  if (!std::filesystem::is_regular_file(path)) {
    throw Error(bundle.string() + " is not signed: it has no manifest.sig; build it with --sign");
  }
  const std::string signature = decoded(content_of(path)), manifest = content_of(bundle / "manifest.json");
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  const auto bytes = [](const std::string& text) { return reinterpret_cast<const unsigned char*>(text.data()); };
  if (signature.empty() || !context ||
      EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, known.get()) != 1 ||
      EVP_DigestVerify(context.get(), bytes(signature), signature.size(), bytes(manifest), manifest.size()) != 1) {
    throw Error(bundle.string() + " is not signed by " + key.string() +
                ": manifest.sig does not fit manifest.json; do not use the bundle, or name the key of who built it");
  }
}

}  // namespace iapt
