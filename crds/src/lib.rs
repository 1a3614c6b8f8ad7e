//! Custom resource types and their generated YAML.
