#!/usr/bin/env bash
# ONNX Runtime for Linux keeps an identifier of the machine and queues events for Microsoft as soon as it is imported,
# and its Python call that turns this off does not keep the identifier from being made.
#
# Expected: as before 1.29, where official builds for Linux had no telemetry; or at least that
# `onnxruntime.disable_telemetry_events()`, called before anything else, leaves nothing behind.
# Seen in onnxruntime 1.31.1 (CPU wheel for Linux x86-64): the import makes ~/.cache/Microsoft/DeveloperTools/
# .onnxruntime/ with a `deviceid` and an SQLite queue of events, which it uploads; after the call they are there as well.
# ORT_DISABLE_TELEMETRY=1, set before the import, leaves nothing; so does CI=true, so that tests in CI never see it.
# Its Privacy.md says the first and the third, and of the call that a first event may have been made before it.
# Runs without a network, so that nothing is sent. Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.31.1

tried() {  # NAME CODE [VARIABLE=VALUE]: whether an identifier was made in an empty home folder
    name=$1 code=$2
    shift 2
    mkdir "$folder/$name"
    unshare --map-root-user --net env --unset=CI --unset=ORT_DISABLE_TELEMETRY --unset=XDG_CACHE_HOME \
        HOME="$folder/$name" "$@" "$folder/env/bin/python" -c "$code" 2>/dev/null
    if [ -n "$(find "$folder/$name" -name deviceid)" ]; then echo "$name: kept"; else echo "$name: nothing"; fi
}

seen=$(
    tried import "import onnxruntime"
    tried call "import onnxruntime; onnxruntime.disable_telemetry_events()"
    tried variable "import onnxruntime" ORT_DISABLE_TELEMETRY=1
    tried ci "import onnxruntime" CI=true
)
echo "$seen"
[ "$(echo "$seen" | paste -sd, -)" = "import: kept,call: kept,variable: nothing,ci: nothing" ] ||
    { echo "this has changed"; exit 1; }
