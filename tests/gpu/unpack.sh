#!/usr/bin/env bash
# Unpack what pack.sh made, from .cache/gpu/parts or the folder that is named: what is whole is unpacked, what is not is
# waited for, so that pieces may come one by one. first_light.sh finds the packages before those of the machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/parcels.sh
PARTS="${1:-.cache/gpu/parts}"
for list in "$PARTS"/*.sha256; do
    [ -f "$list" ] || { echo "nothing to unpack in $PARTS; make it with tests/gpu/pack.sh" >&2; exit 1; }
    name="$(basename "$list" .sha256)"
    case "$name" in
    data) unparcel "$name" "$PARTS" .cache/data ;;
    *) unparcel "$name" "$PARTS" .cache/gpu/site ;;
    esac
done
