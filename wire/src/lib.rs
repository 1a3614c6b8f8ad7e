//! Keys and values of the Cluster Mesh wire format, parsed at the edge.
