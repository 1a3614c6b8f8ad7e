#!/bin/sh
# Builds programs of the workspace for the processor of the image, on that of the machine. For the Dockerfiles beside this.
#
#   images/build.sh tools           the compilers, from Debian
#   images/build.sh build NAME...   the programs, to /out
#
# TARGETARCH is set by BuildKit.
set -eu

case ${TARGETARCH:?BuildKit sets it: build with docker buildx or buildah} in
amd64)
    target=x86_64-unknown-linux-gnu
    cross="gcc-x86-64-linux-gnu libc6-dev-amd64-cross"
    linker=x86_64-linux-gnu-gcc
    ;;
arm64)
    target=aarch64-unknown-linux-gnu
    cross="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    linker=aarch64-linux-gnu-gcc
    ;;
*)
    echo "Isthmus has images for amd64 and arm64, not for $TARGETARCH" >&2
    exit 2
    ;;
esac

case ${1-} in
tools)
    # The machine's own compiler is there.
    if command -v "$linker" >/dev/null; then
        cross=
    fi
    apt-get update -qq
    # protoc reads the messages of etcd's API, libprotobuf-dev brings those of Google's that they include.
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends protobuf-compiler libprotobuf-dev $cross
    rm -rf /var/lib/apt/lists/*
    rustup target add "$target"
    ;;
build)
    shift
    upper=$(echo "$target" | tr 'a-z-' 'A-Z_')
    lower=$(echo "$target" | tr '-' '_')
    export "CARGO_TARGET_${upper}_LINKER=$linker" "CC_$lower=$linker"
    mkdir -p /out
    for name; do
        # The programs are called as their packages are, but for the one that the lab's package has.
        package=$name
        [ "$name" = lab-pod ] && package=isthmus-lab
        [ "$name" = node-agent ] && package=isthmus-node-agent
        cargo build --release --locked --target "$target" --package "$package" --bin "$name"
        # The target folder is a cache, and not in the image.
        cp "target/$target/release/$name" /out/
    done
    ;;
*)
    echo "usage: images/build.sh tools|build NAME..." >&2
    exit 2
    ;;
esac
