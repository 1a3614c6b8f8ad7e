//! Calls that no client of the gateway may make, whatever they say: they are refused unread, as etcd refuses a user who
//! lacks the right, and not as unknown, which clients take for a broken or foreign server.

use tonic::Status;

use super::reply;

/// The answer to a call of this path, if it is one of those.
pub(super) fn refusal(path: &str) -> Option<Status> {
    let (service, method) = path.strip_prefix("/etcdserverpb.")?.split_once('/')?;
    let refused = match service {
        "Auth" => match method {
            // Users here have certificates and no passwords.
            "Authenticate" => return Some(reply::authentication_failed()),
            _ => true,
        },
        "Lease" => matches!(method, "LeaseGrant" | "LeaseRevoke" | "LeaseKeepAlive"),
        "Cluster" => method != "MemberList",
        "Maintenance" => !matches!(method, "Status" | "Alarm"),
        _ => false,
    };
    refused.then(reply::permission_denied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_is_refused_and_what_reads_is_not() {
        let code = |path: &str| refusal(path).map(|status| status.code());
        for path in [
            "Lease/LeaseGrant",
            "Lease/LeaseKeepAlive",
            "Cluster/MemberAdd",
            "Maintenance/Snapshot",
            "Auth/UserAdd",
        ] {
            assert_eq!(code(&format!("/etcdserverpb.{path}")), Some(tonic::Code::PermissionDenied), "{path}");
        }
        assert_eq!(code("/etcdserverpb.Auth/Authenticate"), Some(tonic::Code::InvalidArgument));
        for path in
            ["KV/Range", "Watch/Watch", "Cluster/MemberList", "Maintenance/Status", "Lease/LeaseLeases"]
        {
            assert_eq!(code(&format!("/etcdserverpb.{path}")), None, "{path}");
        }
        assert_eq!(code("/grpc.health.v1.Health/Check"), None);
    }
}
