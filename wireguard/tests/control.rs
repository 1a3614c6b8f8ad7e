//! What control does to network interfaces, in a network namespace. As root.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[expect(dead_code, reason = "shared with other tests and the benchmark, which use the rest")]
mod support;

use std::net::IpAddr;

use isthmus_wireguard::control::{Backend, Control, ControlError, Location};
use support::netns::Namespace;

fn location() -> Location {
    Location { interface: "wg0".to_owned(), uapi_dir: "/nonexistent".into() }
}

/// Runs a future in a namespace, with a runtime of its own.
fn within<T: Send + 'static>(namespace: &Namespace, future: impl Future<Output = T> + Send + 'static) -> T {
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(future))
    };
    namespace.enter(run).unwrap()
}

#[test]
fn the_interface_is_brought_up_with_its_mtu_and_addresses_and_without_routes() {
    let namespace = Namespace::new();
    namespace.ip("tuntap add mode tun wg0");
    let addresses: [IpAddr; 2] = ["10.1.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()];
    let link = within(&namespace, async move {
        let control = Control::open(Backend::Auto, &location()).await.unwrap();
        assert!(!control.is_kernel(), "a process may be behind this interface");
        assert!(!control.link().await.unwrap().up);
        // Once more is no error, and an agent that starts anew does just that.
        control.bring_up(1280, &addresses).await.unwrap();
        control.bring_up(1400, &addresses).await.unwrap()
    });
    assert!(link.up && link.mtu == 1400 && link.index > 0, "{link:?}");
    let shown = namespace.run("ip", &["-brief", "address", "show", "wg0"]);
    assert!(shown.contains("10.1.0.1/32") && shown.contains("fd00:1::1/128"), "{shown}");
    assert_eq!(namespace.run("ip", &["route", "show", "dev", "wg0"]), "");
}

#[test]
fn an_interface_of_another_kind_is_not_touched() {
    let namespace = Namespace::new();
    namespace.ip("link add wg0 type veth peer name other");
    for backend in [Backend::Auto, Backend::Kernel, Backend::User] {
        let opened = within(&namespace, async move { Control::open(backend, &location()).await });
        let error = opened.expect_err("this is no WireGuard device");
        assert!(matches!(error, ControlError::WrongKind { .. }), "{error}");
    }
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let namespace = Namespace::new();
    let error = within(&namespace, async {
        let control = Control::open(Backend::User, &location()).await.unwrap();
        control.bring_up(1420, &[]).await.unwrap_err()
    });
    assert_eq!(
        error.to_string(),
        "there is no network interface `wg0`: the device that makes it does not run"
    );
}
