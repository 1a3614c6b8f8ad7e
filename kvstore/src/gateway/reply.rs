//! What the gateway's answers have in common: the header, and errors in etcd's words.
//!
//! Clients compare the texts: Go's `clientv3` turns them back into its error values, so they are etcd's to the letter.

use std::sync::Arc;

use tonic::{Code, Status};

use super::proto::etcdserverpb::ResponseHeader;
use super::proto::mvccpb;
use crate::memory::{Event, KeyValue, Revision, StoreError, StoreId};

/// What etcd calls a member's view of raft. There is no raft here; clients want it set and steady.
pub(super) const RAFT_TERM: u64 = 2;

/// Who answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) store: StoreId,
    /// This gateway, for as long as it runs.
    pub(super) member: u64,
}

impl Origin {
    pub(super) fn header(self, revision: Revision) -> Option<ResponseHeader> {
        let Self { store: StoreId(cluster_id), member: member_id } = self;
        Some(ResponseHeader { cluster_id, member_id, revision: revision.0, raft_term: RAFT_TERM })
    }
}

pub(super) fn key_value(kv: &KeyValue) -> mvccpb::KeyValue {
    mvccpb::KeyValue { value: kv.value.clone(), ..key_alone(kv) }
}

pub(super) fn key_alone(kv: &KeyValue) -> mvccpb::KeyValue {
    mvccpb::KeyValue {
        key: kv.key.clone(),
        create_revision: kv.create_revision.0,
        mod_revision: kv.mod_revision.0,
        version: kv.version,
        value: bytes::Bytes::new(),
        lease: kv.lease,
    }
}

pub(super) fn event(event: &Event, with_prev: bool) -> mvccpb::Event {
    let kind =
        if event.is_delete() { mvccpb::event::EventType::Delete } else { mvccpb::event::EventType::Put };
    let prev_kv = event.prev.as_ref().filter(|_| with_prev).map(|prev| key_value(prev));
    mvccpb::Event { r#type: kind.into(), kv: Some(key_value(&event.kv)), prev_kv }
}

/// About how many bytes a key takes in a response.
pub(super) fn encoded_size(kv: &Arc<KeyValue>, with_value: bool) -> usize {
    48 + kv.key.len() + if with_value { kv.value.len() } else { 0 }
}

pub(super) const PERMISSION_DENIED: &str = "etcdserver: permission denied";

pub(super) fn permission_denied() -> Status {
    Status::permission_denied(PERMISSION_DENIED)
}

pub(super) fn empty_key() -> Status {
    Status::invalid_argument("etcdserver: key is not provided")
}

pub(super) fn empty_operation() -> Status {
    Status::invalid_argument("etcdserver: key not found")
}

pub(super) fn invalid_sort_option() -> Status {
    Status::invalid_argument("etcdserver: invalid sort option")
}

pub(super) fn too_many_operations() -> Status {
    Status::invalid_argument("etcdserver: too many operations in txn request")
}

pub(super) fn too_large() -> Status {
    Status::invalid_argument("etcdserver: request is too large")
}

pub(super) fn too_many_requests() -> Status {
    Status::resource_exhausted("etcdserver: too many requests")
}

pub(super) fn stopped() -> Status {
    Status::unavailable("etcdserver: server stopped")
}

pub(super) fn timed_out() -> Status {
    Status::unavailable("etcdserver: request timed out")
}

pub(super) fn authentication_failed() -> Status {
    Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password")
}

pub(super) const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";

pub(super) fn store_error(error: StoreError) -> Status {
    let text = match error {
        StoreError::Compacted { .. } => COMPACTED,
        StoreError::Future { .. } => "etcdserver: mvcc: required revision is a future revision",
        StoreError::NotNewer { .. } => return Status::new(Code::Internal, error.to_string()),
    };
    Status::out_of_range(text)
}
