//! Transactions: which ones are let through, and when a comparison holds.

use std::cmp::Ordering;
use std::sync::Arc;

use tonic::Status;

use super::connection::Client;
use super::kv::{check_range, permit_range};
use super::proto::etcdserverpb as pb;
use super::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use super::proto::etcdserverpb::request_op::Request as Operation;
use super::reply;
use crate::memory::{KeyRange, KeyValue};

/// etcd's default for comparisons or operations in one transaction, and for how much deeper nested ones may go.
const MAX_OPERATIONS: usize = 128;

/// Lets a transaction through that is well formed, reads only, and reads only what the client may.
pub(super) fn check(request: &pb::TxnRequest, client: &Client) -> Result<(), Status> {
    check_form(request, MAX_OPERATIONS)?;
    permit(request, client)
}

fn check_form(request: &pb::TxnRequest, allowed: usize) -> Result<(), Status> {
    let operations = request.compare.len().max(request.success.len()).max(request.failure.len());
    let left = allowed.checked_sub(operations).ok_or_else(reply::too_many_operations)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(reply::empty_key());
    }
    for operation in request.success.iter().chain(&request.failure) {
        match &operation.request {
            Some(Operation::RequestRange(range)) => check_range(range)?,
            Some(Operation::RequestPut(put)) if put.key.is_empty() => return Err(reply::empty_key()),
            Some(Operation::RequestDeleteRange(delete)) if delete.key.is_empty() => {
                return Err(reply::empty_key());
            }
            Some(Operation::RequestPut(_) | Operation::RequestDeleteRange(_)) => {}
            Some(Operation::RequestTxn(inner)) => check_form(inner, left)?,
            None => return Err(reply::empty_operation()),
        }
    }
    Ok(())
}

fn permit(request: &pb::TxnRequest, client: &Client) -> Result<(), Status> {
    for compare in &request.compare {
        client.permit(&KeyRange::from_wire(compare.key.clone(), compare.range_end.clone()))?;
    }
    // Both branches, whichever would be taken: etcd checks before it compares.
    for operation in request.success.iter().chain(&request.failure) {
        match &operation.request {
            Some(Operation::RequestRange(range)) => permit_range(client, range)?,
            Some(Operation::RequestTxn(inner)) => permit(inner, client)?,
            _ => return Err(reply::permission_denied()),
        }
    }
    Ok(())
}

/// Whether a comparison holds for every key of its range. Without any key it is made with an absent one (all zero),
/// except for values, where nothing equals or differs from what is not there.
pub(super) fn holds(compare: &pb::Compare, kvs: &[Arc<KeyValue>]) -> bool {
    if kvs.is_empty() {
        return compare.target() != CompareTarget::Value && holds_for(compare, &KeyValue::default());
    }
    kvs.iter().all(|kv| holds_for(compare, kv))
}

fn holds_for(compare: &pb::Compare, kv: &KeyValue) -> bool {
    let wanted = compare.target_union.as_ref();
    let number = |wanted: Option<i64>, found: i64| found.cmp(&wanted.unwrap_or(0));
    let ordering = match compare.target() {
        CompareTarget::Version => number(
            wanted.and_then(|union| if let TargetUnion::Version(n) = union { Some(*n) } else { None }),
            kv.version,
        ),
        CompareTarget::Create => number(
            wanted.and_then(|union| if let TargetUnion::CreateRevision(n) = union { Some(*n) } else { None }),
            kv.create_revision.0,
        ),
        CompareTarget::Mod => number(
            wanted.and_then(|union| if let TargetUnion::ModRevision(n) = union { Some(*n) } else { None }),
            kv.mod_revision.0,
        ),
        CompareTarget::Lease => number(
            wanted.and_then(|union| if let TargetUnion::Lease(n) = union { Some(*n) } else { None }),
            kv.lease,
        ),
        CompareTarget::Value => {
            let wanted = if let Some(TargetUnion::Value(value)) = wanted { &value[..] } else { &[] };
            kv.value[..].cmp(wanted)
        }
    };
    match compare.result() {
        CompareResult::Equal => ordering == Ordering::Equal,
        CompareResult::Greater => ordering == Ordering::Greater,
        CompareResult::Less => ordering == Ordering::Less,
        CompareResult::NotEqual => ordering != Ordering::Equal,
    }
}
