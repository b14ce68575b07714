# Archives in parts that are small enough for any way of sending them; sourced by pack.sh and unpack.sh.
# A parcel NAME is NAME.tar.xz in pieces NAME.00, NAME.01, ... and NAME.sha256, which lists and checks them.
PART_BYTES="${PART_BYTES:-62914560}"  # 60 MiB

# parcel NAME FOLDER PARTS: put the content of FOLDER into pieces in PARTS
parcel() {
    rm -f "$3/$1".[0-9][0-9] "$3/$1.sha256"
    tar -C "$2" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -c . | xz -T0 -6 \
        | split -b "$PART_BYTES" -d -a 2 - "$3/$1."
    (cd "$3" && sha256sum "$1".[0-9][0-9] > "$1.sha256")
}

# unparcel NAME PARTS FOLDER: unpack a parcel into FOLDER, once all its pieces are there; says what it waits for
unparcel() {
    local missing=() sum piece pieces=()
    while read -r sum piece; do
        pieces+=("$2/$piece")
        [ -f "$2/$piece" ] || missing+=("$piece")
    done < "$2/$1.sha256"
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "$1 waits for ${missing[*]}"
        return 0
    fi
    (cd "$2" && sha256sum --quiet -c "$1.sha256") || { echo "$1 is damaged: send it again" >&2; return 1; }
    mkdir -p "$3"
    cat "${pieces[@]}" | xz -dc | tar -C "$3" -x
    echo "$1 is unpacked into $3"
}
