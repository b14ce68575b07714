#!/bin/sh
# check_packages.sh FOLDER: every package in FOLDER has the hash that packages.sha256 records; else say which has not.
set -eu
recorded=$(cd "$(dirname "$0")" && pwd)/packages.sha256
cd "$1"
for file in *; do
    if ! grep " $file\$" "$recorded" | sha256sum --check --status 2>/dev/null; then
        echo "$file is not the package whose hash engines/cpp/packages.sha256 records: compare it with what its authors" \
            "publish and add it there, or name an SDK's folder (docs/deploy.md)" >&2
        exit 1
    fi
done
