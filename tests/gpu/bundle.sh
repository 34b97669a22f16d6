#!/usr/bin/env bash
# Builds the folder that a machine with a GPU and without a network needs beside the checkout.
#
#   tests/gpu/bundle.sh [FOLDER]        (default: .gpu-bundle at the top of the repository)
#
# Such a machine has Linux on x86-64, Python 3.12 and, for it, torch with CUDA, triton, transformers
# with what it needs, numpy, scipy, pyyaml, psutil, xxhash, aiohttp and msgpack, in versions of its
# own. The rest comes from here, in the versions of constraints.txt. docs/gpu.md says more.
set -euo pipefail
cd "$(dirname "$0")/../.."

BUNDLE=$(realpath -m "${1:-.gpu-bundle}")
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
LIMIT_MB=60

SITE=(
    # Ray, and what it imports for Serve and its agents.
    ray aiohttp-cors colorful google-api-core google-auth googleapis-common-protos mmh3 opencensus
    opencensus-context opentelemetry-api opentelemetry-exporter-prometheus opentelemetry-proto
    opentelemetry-sdk opentelemetry-semantic-conventions platformdirs proto-plus pyasn1
    pyasn1_modules smart_open
    # The product: what such a machine lacks, or may have in a version that is too old.
    annotated-doc annotated-types anyio click fastapi filelock gguf grpcio grpcio-health-checking
    grpcio-reflection h11 httpcore httptools httpx Jinja2 llguidance packaging prometheus_client
    protobuf pydantic pydantic_core rich starlette typer typing-inspection typing_extensions uvicorn
    # The tests.
    hypothesis iniconfig jsonschema jsonschema-specifications pluggy pytest pytest-asyncio
    pytest-timeout referencing rpds-py
    # Only benchmarks compare with it, so constraints.txt does not know it.
    liger-kernel==0.8.5
)

# Packs the packages behind the first word, unpacked, as BUNDLE/<first word>.tar.xz.
pack() {
    local name=$1 folder=$work/$1 platforms=()
    shift
    # pip takes a wheel for glibc 2.N only where N is named.
    for minor in 5 12 17 24 27 28 31 34; do
        platforms+=(--platform "manylinux_2_${minor}_x86_64")
    done
    for old in 1 2010 2014; do
        platforms+=(--platform "manylinux${old}_x86_64")
    done
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-compile \
        --only-binary=:all: --implementation cp --python-version 3.12 "${platforms[@]}" \
        -c constraints.txt --target "$folder" "$@"
    rm -rf "$folder/bin"
    if test -d "$folder/ray"; then
        # Java, reinforcement learning, C++ and the dashboard's pages: half of Ray.
        rm -rf "$folder"/ray/{jars,rllib,cpp,dashboard/client}
    fi
    # The filter makes machine code smaller. Blocks are unpacked side by side.
    tar -C "$folder" --sort=name --owner=0 --group=0 -cf - . \
        | xz -T2 --block-size=32MiB --x86 --lzma2=preset=6 > "$BUNDLE/$name.tar.xz"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$BUNDLE"
mkdir -p "$BUNDLE"
pack site "${SITE[@]}"
# The product needs a newer transformers than the machine may have; see unpack.sh.
pack transformers transformers

size=$(du -sm "$BUNDLE" | cut -f1)
echo "$BUNDLE: $size MB"
if ((size > LIMIT_MB)); then
    echo "the bundle may have $LIMIT_MB MB at most" >&2
    exit 1
fi
