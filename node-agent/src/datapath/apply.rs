//! Makes a list of operations, phase by phase. The order is explained in [`ops`](super::ops).

use std::collections::HashMap;

use isthmus_bpf_abi::Backend;

use super::Maps;
use super::error::OpError;
use super::ops::{MapOp, Phase, Target};

/// One result per operation, in the order of the list.
pub(super) fn apply(maps: &Maps, ops: &[MapOp]) -> Vec<Result<(), OpError>> {
    let mut results: Vec<Result<(), OpError>> = vec![Ok(()); ops.len()];
    let mut failed: HashMap<u32, Target> = HashMap::new();
    let mut phases: [Vec<usize>; Phase::ALL.len()] = Default::default();
    for (index, op) in ops.iter().enumerate() {
        phases[op.phase() as usize].push(index);
    }
    for mut phase in phases {
        if !failed.is_empty() {
            phase.retain(|&index| {
                let Some(&cause) = ops[index].service().and_then(|service| failed.get(&service)) else {
                    return true;
                };
                results[index] = Err(OpError::Withheld { cause });
                false
            });
        }
        for (&index, result) in phase.iter().zip(apply_phase(maps, ops, &phase)) {
            if result.is_err()
                && let Some(service) = ops[index].service()
            {
                failed.entry(service).or_insert_with(|| ops[index].target());
            }
            results[index] = result;
        }
    }
    results
}

/// `phase` names operations of one phase.
fn apply_phase(maps: &Maps, ops: &[MapOp], phase: &[usize]) -> Vec<Result<(), OpError>> {
    let Some(&first) = phase.first() else { return Vec::new() };
    let kind = ops[first].phase();
    let ops = phase.iter().map(|&index| &ops[index]);
    match kind {
        Phase::PutIpcache => {
            let (keys, values): (Vec<_>, Vec<_>) = ops
                .filter_map(|op| match *op {
                    MapOp::PutIpcache { key, entry } => Some((key, entry)),
                    _ => None,
                })
                .unzip();
            maps.ipcache.put(&keys, &values)
        }
        Phase::PutBackend | Phase::RetireBackend => {
            let (keys, values): (Vec<_>, Vec<_>) = ops
                .filter_map(|op| match *op {
                    MapOp::PutBackend { id, backend } => Some((id, backend)),
                    _ => None,
                })
                .unzip();
            maps.backends.put(&keys, &values)
        }
        Phase::PutSlot => {
            let (keys, values): (Vec<_>, Vec<_>) = ops
                .filter_map(|op| match *op {
                    MapOp::PutSlot { key, slot } => Some((key, slot)),
                    _ => None,
                })
                .unzip();
            maps.slots.put(&keys, &values)
        }
        Phase::PutService => {
            let (keys, values): (Vec<_>, Vec<_>) = ops
                .filter_map(|op| match *op {
                    MapOp::PutService { key, service } => Some((key, service)),
                    _ => None,
                })
                .unzip();
            maps.services.put(&keys, &values)
        }
        Phase::DeleteService => {
            let keys: Vec<_> = ops
                .filter_map(|op| match *op {
                    MapOp::DeleteService { key, .. } => Some(key),
                    _ => None,
                })
                .collect();
            maps.services.delete(&keys)
        }
        Phase::DeleteSlot => {
            let keys: Vec<_> = ops
                .filter_map(|op| match *op {
                    MapOp::DeleteSlot { key } => Some(key),
                    _ => None,
                })
                .collect();
            maps.slots.delete(&keys)
        }
        Phase::DeleteBackend => {
            // An array has no holes: an unused record is one that nothing matches.
            let keys: Vec<_> = ops
                .filter_map(|op| match *op {
                    MapOp::DeleteBackend { id, .. } => Some(id),
                    _ => None,
                })
                .collect();
            maps.backends.put(&keys, &vec![Backend::NONE; keys.len()])
        }
        Phase::DeleteIpcache => {
            let keys: Vec<_> = ops
                .filter_map(|op| match *op {
                    MapOp::DeleteIpcache { key } => Some(key),
                    _ => None,
                })
                .collect();
            maps.ipcache.delete(&keys)
        }
    }
}
