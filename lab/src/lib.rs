//! Whole clusters on one machine: namespaces as nodes and pods, faults, scenarios.
