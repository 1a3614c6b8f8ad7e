//! The KV service: Range, and transactions that only read. Writes are refused as etcd refuses a user without the right.

use tonic::{Request, Response, Status};

use super::connection::Client;
use super::limits::{Budget, Reserved};
use super::proto::etcdserverpb as pb;
use super::proto::etcdserverpb::kv_server::Kv;
use super::proto::etcdserverpb::range_request::{SortOrder as WireOrder, SortTarget as WireTarget};
use super::proto::etcdserverpb::request_op::Request as Operation;
use super::proto::etcdserverpb::response_op::Response as Outcome;
use super::reply::{self, Origin};
use super::txn;
use crate::memory::{
    KeyRange, MemoryStore, RangeRequest, RangeResponse, Revision, RevisionBounds, SortOrder, SortTarget,
};

/// What all ranges of one transaction may answer together. Each may be the whole store, and there may be 128.
const TXN_ANSWER_BYTES: usize = 32 << 20;

#[derive(Clone, Debug)]
pub(super) struct KvService {
    pub(super) store: MemoryStore,
    pub(super) origin: Origin,
    /// Bytes of answers that may be on their way.
    pub(super) answers: Budget,
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(&self, request: Request<pb::RangeRequest>) -> Result<Response<pb::RangeResponse>, Status> {
        let client = Client::of(&request)?;
        let request = request.into_inner();
        check_range(&request)?;
        permit_range(&client, &request)?;
        let found = self.find(request, None)?;
        // Nothing but pointers is held while the answer waits for its room.
        let room = self.answers.reserve(found.size).await?;
        Ok(with_room(found.render(self.origin), room))
    }

    async fn txn(&self, request: Request<pb::TxnRequest>) -> Result<Response<pb::TxnResponse>, Status> {
        let client = Client::of(&request)?;
        let request = request.into_inner();
        txn::check(&request, &client)?;
        let now = self.store.revision();
        let mut size = 0;
        let response = self.transact(request, now, &mut size)?;
        Ok(with_room(response, self.answers.reserve(size).await?))
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, Status> {
        Err(refuse_write(&request.into_inner().key))
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        Err(refuse_write(&request.into_inner().key))
    }

    async fn compact(
        &self,
        _: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        Err(reply::permission_denied())
    }
}

impl KvService {
    /// Looks a range up; `now` is the revision to take for the present one.
    fn find(&self, request: pb::RangeRequest, now: Option<Revision>) -> Result<Found, Status> {
        let keys_only = request.keys_only;
        let mut request = range_request(request);
        request.revision = request.revision.or(now);
        let mut found = self.store.range(&request).map_err(reply::store_error)?;
        found.revision = now.unwrap_or(found.revision);
        let size = found.kvs.iter().map(|kv| reply::encoded_size(kv, !keys_only)).sum();
        Ok(Found { found, keys_only, size })
    }

    fn transact(
        &self,
        request: pb::TxnRequest,
        now: Revision,
        size: &mut usize,
    ) -> Result<pb::TxnResponse, Status> {
        let mut succeeded = true;
        for compare in &request.compare {
            let range = KeyRange::from_wire(compare.key.clone(), compare.range_end.clone());
            let request = RangeRequest { revision: Some(now), ..RangeRequest::new(range) };
            let found = self.store.range(&request).map_err(reply::store_error)?;
            if !txn::holds(compare, &found.kvs) {
                succeeded = false;
                break;
            }
        }
        let operations = if succeeded { request.success } else { request.failure };
        let mut responses = Vec::with_capacity(operations.len());
        for operation in operations {
            let outcome = match operation.request {
                Some(Operation::RequestRange(range)) => {
                    let found = self.find(range, Some(now))?;
                    *size += found.size;
                    if *size > TXN_ANSWER_BYTES {
                        return Err(reply::too_large());
                    }
                    Outcome::ResponseRange(found.render(self.origin))
                }
                Some(Operation::RequestTxn(inner)) => Outcome::ResponseTxn(self.transact(inner, now, size)?),
                // `txn::check` lets no other operation through.
                _ => return Err(reply::permission_denied()),
            };
            responses.push(pb::ResponseOp { response: Some(outcome) });
        }
        Ok(pb::TxnResponse { header: self.origin.header(now), succeeded, responses })
    }
}

/// What a range has found, not yet in the form in which it is sent.
struct Found {
    found: RangeResponse,
    keys_only: bool,
    /// About how many bytes it takes in the response.
    size: usize,
}

impl Found {
    fn render(self, origin: Origin) -> pb::RangeResponse {
        let RangeResponse { revision, kvs, count, more } = self.found;
        let render = if self.keys_only { reply::key_alone } else { reply::key_value };
        pb::RangeResponse {
            header: origin.header(revision),
            kvs: kvs.iter().map(|kv| render(kv)).collect(),
            more,
            count: i64::try_from(count).unwrap_or(i64::MAX),
        }
    }
}

/// The room is held until the client has the answer.
fn with_room<T>(message: T, room: Reserved) -> Response<T> {
    let mut response = Response::new(message);
    response.extensions_mut().insert(room);
    response
}

pub(super) fn check_range(request: &pb::RangeRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(reply::empty_key());
    }
    let known =
        WireOrder::try_from(request.sort_order).is_ok() && WireTarget::try_from(request.sort_target).is_ok();
    if known { Ok(()) } else { Err(reply::invalid_sort_option()) }
}

pub(super) fn permit_range(client: &Client, request: &pb::RangeRequest) -> Result<(), Status> {
    client.permit(&KeyRange::from_wire(request.key.clone(), request.range_end.clone()))
}

fn refuse_write(key: &[u8]) -> Status {
    if key.is_empty() { reply::empty_key() } else { reply::permission_denied() }
}

fn range_request(request: pb::RangeRequest) -> RangeRequest {
    let positive = |revision: i64| (revision > 0).then_some(Revision(revision));
    let bound = |revision: i64| (revision != 0).then_some(Revision(revision));
    let sort_target = match request.sort_target() {
        WireTarget::Key => SortTarget::Key,
        WireTarget::Version => SortTarget::Version,
        WireTarget::Create => SortTarget::CreateRevision,
        WireTarget::Mod => SortTarget::ModRevision,
        WireTarget::Value => SortTarget::Value,
    };
    let sort_order = match request.sort_order() {
        WireOrder::None => None,
        WireOrder::Ascend => Some(SortOrder::Ascending),
        WireOrder::Descend => Some(SortOrder::Descending),
    };
    RangeRequest {
        revision: positive(request.revision),
        limit: usize::try_from(request.limit).unwrap_or(0),
        count_only: request.count_only,
        sort_target,
        sort_order,
        mod_revisions: RevisionBounds {
            min: bound(request.min_mod_revision),
            max: bound(request.max_mod_revision),
        },
        create_revisions: RevisionBounds {
            min: bound(request.min_create_revision),
            max: bound(request.max_create_revision),
        },
        range: KeyRange::from_wire(request.key, request.range_end),
    }
}
