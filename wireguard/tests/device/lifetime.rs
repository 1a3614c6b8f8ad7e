//! Opening, closing and opening again.

use isthmus_wireguard::device::{Device, DeviceError, DeviceOptions, delete_interface};

use crate::field::{open, options, wait_for};
use crate::netns::Namespace;

fn index_of(namespace: &Namespace, name: &'static str) -> Option<u32> {
    namespace.enter(move || Ok(nix::net::if_::if_nametoindex(name).ok())).expect("the namespace")
}

#[test]
fn the_interface_outlives_the_device_and_keeps_its_index_until_it_is_deleted() {
    let namespace = Namespace::new();
    let device = open(&namespace, options(false));
    let index = index_of(&namespace, "wg0").expect("an interface");
    drop(device);
    assert_eq!(index_of(&namespace, "wg0"), Some(index));
    let device = open(&namespace, options(false));
    assert_eq!(index_of(&namespace, "wg0"), Some(index));
    let delete = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(delete_interface("wg0")))
    };
    assert!(matches!(namespace.enter(delete).unwrap(), Err(DeviceError::InUse { .. })));
    drop(device);
    namespace.enter(delete).unwrap().unwrap();
    assert_eq!(index_of(&namespace, "wg0"), None);
    // There is nothing to delete any more, which is as it should be.
    namespace.enter(delete).unwrap().unwrap();
}

#[test]
fn an_ephemeral_interface_goes_with_its_device() {
    let namespace = Namespace::new();
    let device = open(&namespace, options(true));
    assert!(index_of(&namespace, "wg0").is_some());
    drop(device);
    assert_eq!(index_of(&namespace, "wg0"), None);
}

#[test]
fn two_devices_cannot_share_an_interface() {
    let namespace = Namespace::new();
    let _device = open(&namespace, options(true));
    let second = namespace.enter(move || Ok(Device::open(&options(true)).err())).unwrap();
    assert!(matches!(second, Some(DeviceError::InUse { .. })), "{second:?}");
}

#[test]
fn a_name_that_the_kernel_does_not_allow_is_refused_with_the_rule() {
    for name in ["", "sixteen-bytes-xx", "a/b", "a b", ".."] {
        assert!(matches!(Device::open(&DeviceOptions::new(name, 1420)), Err(DeviceError::BadName(_))));
    }
}

#[test]
fn a_device_whose_interface_is_deleted_says_that_it_cannot_go_on() {
    let namespace = Namespace::new();
    let device = open(&namespace, options(true));
    let broken = device.broken();
    assert!(!broken.is_cancelled());
    namespace.ip("link delete wg0");
    wait_for("the device to notice", || broken.is_cancelled().then_some(()));
}
