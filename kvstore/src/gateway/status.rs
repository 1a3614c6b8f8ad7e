//! The services that tell clients about the server: Maintenance, Cluster and what there is of Lease.

use tonic::{Request, Response, Status};

use super::proto::etcdserverpb as pb;
use super::proto::etcdserverpb::alarm_request::AlarmAction;
use super::proto::etcdserverpb::cluster_server::Cluster;
use super::proto::etcdserverpb::lease_server::Lease;
use super::proto::etcdserverpb::maintenance_server::Maintenance;
use super::reply::{self, Origin, RAFT_TERM};
use crate::memory::MemoryStore;

/// The etcd whose behaviour this is. Cilium refuses servers before 3.1; Kubernetes clients trust progress requests from
/// 3.5.13 on, and they may here; from 3.6 on clients may expect what came with it (`RangeStream`, storage versions).
const VERSION: &str = "3.5.21";

#[derive(Clone, Debug)]
pub(super) struct StatusService {
    pub(super) store: MemoryStore,
    pub(super) origin: Origin,
    pub(super) name: String,
    pub(super) client_urls: Vec<String>,
}

impl StatusService {
    fn header(&self) -> Option<pb::ResponseHeader> {
        self.origin.header(self.store.revision())
    }
}

#[tonic::async_trait]
impl Maintenance for StatusService {
    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        let stats = self.store.stats();
        let size = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX);
        let index = u64::try_from(stats.revision.0).unwrap_or(1);
        Ok(Response::new(pb::StatusResponse {
            header: self.origin.header(stats.revision),
            version: VERSION.to_owned(),
            db_size: size(stats.live_bytes + stats.history_bytes),
            db_size_in_use: size(stats.live_bytes),
            leader: self.origin.member,
            raft_index: index,
            raft_applied_index: index,
            raft_term: RAFT_TERM,
            errors: Vec::new(),
            is_learner: false,
        }))
    }

    async fn alarm(&self, request: Request<pb::AlarmRequest>) -> Result<Response<pb::AlarmResponse>, Status> {
        // `etcdctl endpoint health` asks for them. There are none.
        if request.into_inner().action() == AlarmAction::Get {
            return Ok(Response::new(pb::AlarmResponse { header: self.header() }));
        }
        Err(reply::permission_denied())
    }
}

#[tonic::async_trait]
impl Cluster for StatusService {
    async fn member_list(
        &self,
        _: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        let member = pb::Member {
            id: self.origin.member,
            name: self.name.clone(),
            peer_ur_ls: Vec::new(),
            client_ur_ls: self.client_urls.clone(),
            is_learner: false,
        };
        Ok(Response::new(pb::MemberListResponse { header: self.header(), members: vec![member] }))
    }
}

/// Leases belong to those who write, elsewhere. Here none is known.
#[tonic::async_trait]
impl Lease for StatusService {
    async fn lease_time_to_live(
        &self,
        request: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        let id = request.into_inner().id;
        let (ttl, granted_ttl, keys) = (-1, 0, Vec::new());
        Ok(Response::new(pb::LeaseTimeToLiveResponse { header: self.header(), id, ttl, granted_ttl, keys }))
    }

    async fn lease_leases(
        &self,
        _: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        Ok(Response::new(pb::LeaseLeasesResponse { header: self.header(), leases: Vec::new() }))
    }
}
