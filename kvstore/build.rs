//! Generates the messages and services of the etcd v3 API. Needs `protoc` (Debian: `protobuf-compiler`).

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure()
        .build_client(false)
        // Keys and values are handed to the encoder as they lie in the store.
        .bytes(".")
        .compile_protos(&["proto/rpc.proto"], &["proto"])
}
