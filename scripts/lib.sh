# Shared by the scripts here; sourced by bash, never run.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }
step() { printf '\n== %s\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# What is used of DPDK is decided once, here. Cargo's build scripts see the
# second variable, which the pkg-config crate reads: libdpdk is then not found.
use_dpdk() {
    [[ ${GENIE_WITHOUT_DPDK:-0} != 1 ]]
}
if ! use_dpdk; then
    export LIBDPDK_NO_PKG_CONFIG=1
fi

# Why DPDK can't be built here; nothing when it can.
dpdk_missing() {
    if ! use_dpdk; then
        echo "GENIE_WITHOUT_DPDK=1 is set"
    elif ! command -v pkg-config >/dev/null; then
        echo "pkg-config is not installed"
    elif ! pkg-config --atleast-version=22.11 libdpdk; then
        echo "libdpdk 22.11 or newer is not installed (on Debian: apt install libdpdk-dev)"
    elif ! libclang_found; then
        echo "libclang is not installed (on Debian: apt install libclang-dev)"
    fi
}

libclang_found() {
    [[ -n ${LIBCLANG_PATH:-} ]] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null ||
        compgen -G '/usr/lib*/libclang*.so*' >/dev/null ||
        compgen -G '/usr/lib/*-linux-gnu/libclang*.so*' >/dev/null
}

# Python with the safetensors package, in a virtual environment because
# Debian's own Python takes no packages (PEP 668). Made by scripts/setup.
# shellcheck disable=SC2034 # used by the scripts that source this
PYTHON_VENV=$PWD/.cache/python

# Huge pages of 2 MB. The pool is changed under a lock on the kernel's own
# file, as genie-hugepages does; what was added is given back, no more.
POOL=/sys/kernel/mm/hugepages/hugepages-2048kB
HUGEPAGES_ADDED=0

pool_count() { cat "$POOL/$1" 2>/dev/null || echo 0; }

free_hugepages() {
    local left=$(($(pool_count free_hugepages) - $(pool_count resv_hugepages)))
    echo $((left > 0 ? left : 0))
}

# Sets the pool's size by a difference; prints by how much it really changed.
change_pool() {
    (
        flock -w 10 9 || die "another process holds the lock on $POOL/nr_hugepages"
        before=$(($(pool_count nr_hugepages) - $(pool_count surplus_hugepages)))
        target=$((before + $1))
        echo $((target > 0 ? target : 0)) >"$POOL/nr_hugepages"
        after=$(($(pool_count nr_hugepages) - $(pool_count surplus_hugepages)))
        echo $((after - before))
    ) 9<"$POOL/nr_hugepages"
}

# Sees to it that this many pages are free, adding what lacks. Where that
# can't be, says why on stderr and returns 1 with the pool as it was.
reserve_hugepages() {
    local wanted=$1 lacking available
    lacking=$((wanted - $(free_hugepages)))
    ((lacking > 0)) || return 0
    if [[ ! -d $POOL ]]; then
        say "huge pages: this kernel has no 2 MB pages"
        return 1
    fi
    if [[ ! -w $POOL/nr_hugepages ]]; then
        say "huge pages: $(free_hugepages) of $wanted are free and only root can add; as root:" \
            "echo $((wanted + $(pool_count nr_hugepages))) > $POOL/nr_hugepages"
        return 1
    fi
    # Half of what is available at most: the programs need ordinary memory too.
    available=$(awk '/^MemAvailable:/ { print int($2 / 2048) }' /proc/meminfo)
    if ((lacking > available / 2)); then
        say "huge pages: $lacking pages of 2 MB are more than half of the memory available"
        return 1
    fi
    local added
    added=$(change_pool "$lacking") || return 1
    HUGEPAGES_ADDED=$((HUGEPAGES_ADDED + added))
    if ((added < lacking)); then
        say "huge pages: only $added of $lacking could be reserved, memory is fragmented;" \
            "as root: echo 1 > /proc/sys/vm/compact_memory, then try again"
        release_hugepages
        return 1
    fi
    say "huge pages: added $added pages of 2 MB, to be given back at the end"
}

release_hugepages() {
    ((HUGEPAGES_ADDED > 0)) || return 0
    local removed
    removed=$(change_pool "-$HUGEPAGES_ADDED") || return 1
    say "huge pages: gave back $((-removed)) pages of 2 MB"
    HUGEPAGES_ADDED=0
}
