//! Label selectors. (Which labels an endpoint has is [`isthmus_wire::pod_labels`]'s to say.)

mod selector;

pub use selector::{Operator, Requirement, Selector, Source};
