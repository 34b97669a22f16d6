#!/usr/bin/env bash
# Unpacks what bundle.sh built, on the machine with the GPU. Nothing is installed.
#
#   tests/gpu/unpack.sh BUNDLE FOLDER
#   . FOLDER/env.sh         # then python3 finds the project and what it needs
set -euo pipefail

BUNDLE=$(realpath "$1")
mkdir -p "$2"
FOLDER=$(realpath "$2")
ROOT=$(realpath "$(dirname "$0")/../..")

for archive in site transformers; do
    mkdir -p "$FOLDER/$archive"
    if command -v xz > /dev/null; then
        xz -dc -T0 "$BUNDLE/$archive.tar.xz" | tar -C "$FOLDER/$archive" -xf - &
    else
        python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' \
            "$BUNDLE/$archive.tar.xz" "$FOLDER/$archive" &
    fi
    unpacking+=($!)
done
for one in "${unpacking[@]}"; do
    wait "$one"
done

# Many processes of Ray import the same modules at once: none of them shall have to compile.
# A few files of packages are templates that do not compile.
python3 -m compileall -q -j 0 "$FOLDER/site/ray" > /dev/null || true

# The endpoint asks for the version of Moesaic, which is not installed.
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$ROOT/pyproject.toml")
info=$FOLDER/site/moesaic-$version.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: moesaic\nVersion: %s\n' "$version" > "$info/METADATA"

path=$FOLDER/site:$ROOT/src:$ROOT
needed=$(sed -n 's/^ *"\(transformers>[^"]*\)",$/\1/p' "$ROOT/pyproject.toml")
# The machine's own transformers is used if it is new enough.
if ! PYTHONPATH=$path python3 - "$needed" <<'PYTHON'; then
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

needed = Requirement(sys.argv[1])
found = version(needed.name)
if found not in needed.specifier:
    sys.exit(f"{needed.name} {found} is too old for {needed}: the bundle's is used")
PYTHON
    path=$FOLDER/transformers:$path
fi
echo "export PYTHONPATH=$path" > "$FOLDER/env.sh"
