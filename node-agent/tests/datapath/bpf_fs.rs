//! The BPF file system is mounted where it is missing.

use isthmus_node_agent::datapath::bpf_fs::ensure_mounted;

use crate::sandbox::sandbox;

#[test]
fn it_is_mounted_once_and_can_be_pinned_in() {
    sandbox(|sandbox| {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(ensure_mounted(folder.path()).expect("mounted"), "it was there before");
        assert!(!ensure_mounted(folder.path()).expect("there"), "it was mounted twice");
        drop(sandbox.datapath_with(|config| config.pin_dir = folder.path().join("isthmus")));
        assert!(folder.path().join("isthmus").is_dir());
        nix::mount::umount2(folder.path(), nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
    });
}

#[test]
fn a_directory_that_is_missing_is_named() {
    sandbox(|_| {
        let error = ensure_mounted("/nowhere/bpf".as_ref()).expect_err("it is not there");
        assert!(error.to_string().contains("/nowhere/bpf"), "{error}");
    });
}
