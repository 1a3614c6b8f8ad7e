//! Watches of the Kubernetes API.

use std::fmt::Debug;
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use kube::runtime::watcher::{Config, Error, Event, Result};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

/// How long to wait before everything is listed again.
const RELIST: Duration = Duration::from_secs(1);

/// Watches the objects that `config` selects, without end. Failures are part of the stream; it goes on after each, with a
/// growing delay.
///
/// A watch that the API refuses to begin since its revision has expired (410: a proxy, or a restored or restarted API,
/// says so outright) begins with a list again. kube's own stream would ask for the same revision for ever.
pub fn watch<K>(api: Api<K>, config: Config) -> impl Stream<Item = Result<Event<K>>> + Send + 'static
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let begin = move || watcher(api.clone(), config.clone()).default_backoff().boxed();
    stream::unfold((begin, None, false), async |(begin, events, expired)| {
        let mut events: BoxStream<'static, _> = match events {
            Some(events) => events,
            None => {
                if expired {
                    tokio::time::sleep(RELIST).await;
                }
                begin()
            }
        };
        let event = events.next().await?;
        let expired = event.as_ref().is_err_and(is_refused_as_expired);
        Some((event, (begin, (!expired).then_some(events), expired)))
    })
}

fn is_refused_as_expired(error: &Error) -> bool {
    matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::{Body, Bytes};
    use axum::extract::Query;
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use axum::routing::get;
    use axum::{Json, Router};
    use k8s_openapi::api::core::v1::Pod;
    use kube::ResourceExt;
    use serde_json::json;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    /// Has forgotten the revision of its first list by the time that a watch is to begin there.
    fn answer(watches: bool, revision: Option<&String>, lists: &AtomicUsize) -> Response {
        let pod = |name: &str, revision: &str| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "resourceVersion": revision}});
        if !watches {
            let revision = (lists.fetch_add(1, Ordering::Relaxed) + 1).to_string();
            let list = json!({
                "apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": revision},
                "items": [pod("listed", &revision)],
            });
            return Json(list).into_response();
        }
        if revision.is_some_and(|revision| revision == "1") {
            let status = json!({
                "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": 410,
                "reason": "Expired", "message": "too old resource version: 1",
            });
            return (StatusCode::GONE, Json(status)).into_response();
        }
        let added = format!("{}\n", json!({"type": "ADDED", "object": pod("watched", "3")}));
        let once = stream::once(async move { std::io::Result::Ok(Bytes::from(added)) });
        Body::from_stream(once.chain(stream::pending())).into_response()
    }

    #[tokio::test]
    async fn a_watch_that_is_refused_as_expired_begins_with_a_list_again() {
        let lists = Arc::new(AtomicUsize::new(0));
        let api = Router::new().route(
            "/api/v1/pods",
            get(async move |Query(query): Query<HashMap<String, String>>| {
                answer(query.contains_key("watch"), query.get("resourceVersion"), &lists)
            }),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = tokio::spawn(async move { axum::serve(listener, api).await });
        let url = format!("http://{address}").parse().expect("a URL");
        let client = kube::Client::try_from(kube::Config::new(url)).expect("a client");

        let mut events = std::pin::pin!(watch(Api::<Pod>::all(client), Config::default()));
        let (mut refusals, mut lists) = (0, 0);
        let watched = async {
            loop {
                match events.next().await.expect("an endless stream") {
                    Ok(Event::Apply(pod)) => return pod.name_any(),
                    Ok(Event::InitDone) => lists += 1,
                    Ok(_) => {}
                    Err(error) if is_refused_as_expired(&error) => refusals += 1,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let name = tokio::time::timeout(DEADLINE, watched).await.expect("the watch begins");
        assert_eq!((name.as_str(), refusals, lists), ("watched", 1, 2));
        server.abort();
    }
}
