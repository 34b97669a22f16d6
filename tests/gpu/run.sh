#!/usr/bin/env bash
# Runs the tests marked `cuda` on a machine with a GPU, with the bundle that bundle.sh built.
#
#   tests/gpu/run.sh [--bundle FOLDER] [--seconds N] [option of pytest ...]
#
# Nothing is installed or fetched: torch, triton and much else are the machine's own. Tests that start
# Ray come last. The exit code is not 0 if a test failed, if the time (480 s in all) was over, or if
# there is no CUDA device.
set -euo pipefail
cd "$(dirname "$0")/../.."

bundle=.gpu-bundle
seconds=480
while (($#)); do
    case $1 in
        --bundle) bundle=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        *) break ;;
    esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests/gpu/unpack.sh "$bundle" "$work"
# shellcheck disable=SC1091
. "$work/env.sh"
echo "the bundle is unpacked after $SECONDS s"

# Only these files are collected: others import packages that neither machine nor bundle has.
mapfile -t files < <(grep -rlE 'mark\.cuda\b' tests --include='test_*.py' | sort)
failed=0

# The machine's own plugins of pytest may not suit the pytest of the bundle.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

# Runs the tests with this mark in the time that is left. Warnings are no errors here: those of other
# versions say nothing about the card.
run() {
    local mark=$1 code=0
    shift
    timeout --signal=INT --kill-after=30 $((seconds > SECONDS ? seconds - SECONDS : 1)) \
        python3 -m pytest -p pytest_asyncio.plugin -p pytest_timeout -p _hypothesis_pytestplugin \
        -p no:cacheprovider -W default --disable-warnings --timeout 120 --durations 8 -m "$mark" \
        "$@" "${files[@]}" || code=$?
    # 5: no test has this mark.
    if ((code != 0 && code != 5)); then
        echo "pytest -m '$mark' ended with $code, after $SECONDS s in all"
        failed=1
    fi
}

python3 -m tests.gpu.machine || failed=1
run "cuda and not alone" "$@"
run "cuda and alone" "$@"
echo "run.sh took $SECONDS s; $( ((failed)) && echo "something failed" || echo "all passed")"
exit "$failed"
