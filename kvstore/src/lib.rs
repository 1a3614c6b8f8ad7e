//! An MVCC store served over the etcd v3 API, and the sync protocol of Cluster Mesh.
