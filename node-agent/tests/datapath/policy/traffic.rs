//! Real connections between namespaces.
