//! The generated messages and services.
#![allow(missing_docs, unreachable_pub, clippy::all)]

pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}
