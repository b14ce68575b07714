#ifndef IAPT_SRC_TENANT_CARD_H_
#define IAPT_SRC_TENANT_CARD_H_

#include <map>
#include <string>

#include "iapt/manifest.h"

namespace iapt {

// Compares what a bundle's tenant says of itself, in the metadata of its file, with the manifest, as
// iapt_export/contract/tenant_card.py does. Throws Error: there is no valid card, or it says something else.
void check_card(const std::map<std::string, std::string>& metadata, const std::string& path,
                const BundleManifest& manifest, const TenantSpec& tenant, const MethodSpec& method);

}  // namespace iapt

#endif  // IAPT_SRC_TENANT_CARD_H_
